"""Values that reach a node over a link, held to the limits of its widgets: ComfyUI checks only what is typed in."""

from comfy_api.latest import io


def check_values(inputs: list, **values) -> None:
    """Raises ValueError for a value outside what the input of its name, in a schema's inputs, lets users type in."""
    for widget in inputs:
        if widget.id in values:
            _check_value(widget, values[widget.id])


def _check_value(widget, value) -> None:
    if isinstance(widget, io.Combo.Input):
        fits, expected = value in widget.options, f"one of {', '.join(widget.options)}"
    elif isinstance(widget, io.Int.Input):
        fits, expected = _lies_within(widget, value, int), f"a whole number from {widget.min} to {widget.max}"
    else:
        fits, expected = _lies_within(widget, value, (int, float)), f"a number from {widget.min} to {widget.max}"
    if not fits:
        raise ValueError(f"{widget.id} is {value!r}: expected {expected}. Look at the node that it is linked from")


def _lies_within(widget, value, kinds) -> bool:
    return isinstance(value, kinds) and widget.min <= value <= widget.max
