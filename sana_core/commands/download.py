"""`download`: published models into ComfyUI's folders."""

import argparse
import sys
from pathlib import Path

from ..hub import DownloadError, comfyui_models, download
from ..published import PUBLISHED, describe_size, find_published, with_parts


def add_parser(commands) -> None:
    """Declare `download` among the commands."""
    parser = commands.add_parser(
        "download",
        help="fetch published models",
        description="Fetch published models from huggingface.co into ComfyUI's model folders: a transformer with the "
        "text encoder and the autoencoder that it needs. What is there already is left alone, and what was cut off is "
        "gone on with.",
        epilog="HF_TOKEN is read for files that ask for an account, HF_ENDPOINT names another hub.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="a name of --list, or the repository of one")
    add("--list", action="store_true", help="what there is, with sizes and licences, and nothing else")
    add("--only", action="store_true", help="without what the named ones need besides")
    add(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="a ComfyUI's models folder; the default is that of the ComfyUI in whose custom_nodes this pack lies",
    )
    add("--verbose", action="store_true", help="say where in a file it begins")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """List the table, or fetch the files that were named and write their paths to stdout."""
    if args.list:
        sys.stdout.writelines(_lines())
        return
    if not args.names:
        raise ValueError("name what to download; --list shows what there is")
    named = [find_published(name) for name in args.names]
    files = dict.fromkeys(part for file in named for part in ([file] if args.only else with_parts(file)))
    models = _models_folder(args.to)
    for licence in dict.fromkeys(file.licence for file in files):
        names = ", ".join(file.name for file in files if file.licence == licence)
        sys.stderr.write(f"{names}: {licence}\n")
    try:
        for path, was_there in download(files, lambda file: models / file.folder):
            sys.stdout.write(f"{path}{' (was there already)' if was_there else ''}\n")
    except KeyboardInterrupt:
        raise DownloadError("stopped. What has come is kept, the same command goes on from there") from None


def _lines():
    width = max(map(len, PUBLISHED))
    for file in PUBLISHED.values():
        whole = sum(part.size for part in with_parts(file))
        needs = f", {describe_size(whole)} with what it needs" if file.needs else ""
        yield f"{file.name:{width}}  {describe_size(file.size):>8}{needs}\n"
        yield f"{'':{width}}  {file.page}, to models/{file.folder}. {file.licence}\n"


def _models_folder(to: Path | None) -> Path:
    folder = to or comfyui_models()
    if folder is None:
        raise ValueError("this pack lies in no ComfyUI's custom_nodes: say with --to which models folder to fill")
    if to and (to / "models").is_dir():  # a whole ComfyUI was named
        return to / "models"
    return folder
