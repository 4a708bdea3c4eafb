"""X/Y grids: two lists of values for any inputs of a graph, and the sheet of what came of them."""

from dataclasses import dataclass

import numpy as np
import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..sana_core.grid import Axis, draw_grid, split_values
from ..sana_core.pictures import to_pictures


@dataclass(frozen=True)
class Layout:
    """Columns and rows of a grid."""

    x: Axis
    y: Axis


LayoutType = io.Custom("SANA_GRID")


class SanaXYValues(io.ComfyNode):
    """Two texts to two lists that hold every pair of their values."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaXYValues",
            display_name="Sana X/Y Values",
            category="sana/image",
            description="Gives every pair of the x and y values in turn: what is connected runs once for each pair. "
            "Put the pictures on one sheet with Sana X/Y Grid.",
            search_aliases=["xy plot", "x/y/z plot", "grid", "parameter sweep", "list of values"],
            inputs=[
                _values("x_values", "10, 20", "columns"),
                _values("y_values", "", "rows; empty for a single row"),
                _name("x_name", "columns"),
                _name("y_name", "rows"),
            ],
            outputs=[
                io.AnyType.Output(
                    "x",
                    display_name="x",
                    is_output_list=True,
                    tooltip="The x value of each picture, for any input: steps, cfg, seed, a text, a file name.",
                ),
                io.AnyType.Output(
                    "y", display_name="y", is_output_list=True, tooltip="The y value of each picture, for any input."
                ),
                LayoutType.Output("layout", display_name="layout", tooltip="For Sana X/Y Grid."),
            ],
        )

    @classmethod
    def execute(cls, x_values, y_values="", x_name="", y_name="") -> io.NodeOutput:
        """Row after row: each y value with all x values. Raises ValueError for an empty value."""
        x, y = split_values(x_values), split_values(y_values) if y_values.strip() else [""]
        layout = Layout(Axis(x_name.strip(), tuple(x)), Axis(y_name.strip() if y != [""] else "", tuple(y)))
        return io.NodeOutput(_typed(x) * len(y), [value for value in _typed(y) for _ in x], layout)


class SanaXYGrid(io.ComfyNode):
    """Pictures of all pairs to one sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaXYGrid",
            display_name="Sana X/Y Grid",
            category="sana/image",
            description="Puts the pictures that Sana X/Y Values has led to on one sheet, with the values beside them.",
            search_aliases=["xy plot", "contact sheet", "image grid", "compare"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures, one for each pair. A batch stands side by side."),
                LayoutType.Input("layout", tooltip="From Sana X/Y Values."),
            ],
            outputs=[io.Image.Output("sheet", display_name="IMAGE", tooltip="The sheet, for Save Image.")],
        )

    @classmethod
    def execute(cls, images: list[Tensor], layout: list[Layout]) -> io.NodeOutput:
        """The sheet [1, H, W, 3]. Raises ValueError where the number of pictures is not that of the pairs."""
        (grid,) = layout
        wide = [rearrange(batch[..., :3], "b h w c -> 1 c h (b w)").clamp(0, 1) for batch in images]
        pictures = [picture for batch in wide for picture in to_pictures(batch)]
        columns, rows = grid.x.labels, grid.y.labels
        if len(pictures) != len(columns) * len(rows):
            raise ValueError(
                f"{len(pictures)} pictures came for {len(columns)} columns and {len(rows)} rows. Connect x and y of "
                "the same Sana X/Y Values to nodes that these pictures come from; what only one row or column "
                "depends on is drawn for it alone."
            )
        sheet = draw_grid(pictures, columns, rows)
        return io.NodeOutput(torch.from_numpy(np.array(sheet)).float().div(255)[None])


def _values(name: str, default: str, what: str) -> io.String.Input:
    return io.String.Input(
        name,
        default=default,
        multiline=True,
        tooltip=f"Values of the {what}. Put commas between them, or | where a value holds a comma itself.",
    )


def _name(name: str, what: str) -> io.String.Input:
    tooltip = f"What stands before each value at the {what}, such as steps."
    return io.String.Input(name, default="", optional=True, tooltip=tooltip)


def _typed(values: list[str]) -> list[int] | list[float] | list[str]:
    """The values as whole numbers, else as numbers, else as they are: all of one kind."""
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return values
