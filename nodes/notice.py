"""What a node has to say about its work, on the node itself."""

from comfy_api.latest import ui
from server import PromptServer


def notice(text: str, hidden) -> ui.PreviewText:
    """Write a text on the node, and return it as the node's output for those who read the history.

    The front end draws the text output of core's Preview as Text alone: on other nodes it must be sent as progress.

    hidden: of the node, whose schema asks for unique_id; None where no server runs it.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None and hidden is not None:
        server.send_progress_text(text, hidden.unique_id)
    return ui.PreviewText(text)
