"""A real ComfyUI server in a subprocess, and a client that queues workflows and follows them."""

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from PIL import Image
from safetensors.torch import load_file

START_TIMEOUT = 240  # seconds; half a minute is usual
RUN_TIMEOUT = 240


@dataclass
class Run:
    """What became of one queued workflow."""

    outputs: dict[str, dict] = field(default_factory=dict)  # node id -> what it showed
    previews: int = 0
    error: dict | None = None  # of execution_error
    interrupted: bool = False
    progress: list[int] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)  # ids of the nodes that no cache spared
    texts: dict[str, str] = field(default_factory=dict)  # node id -> what is written on it


class Refused(Exception):
    """The server did not accept the workflow; holds its answer."""


class Server:
    """ComfyUI with its own folders below `base`, the pack linked into custom_nodes, and nothing else."""

    def __init__(self, comfyui: Path, base: Path, pack: Path, models: Path, *options: str):
        self.base = base
        self.log = base / "server.log"
        self.port = _free_port()
        (base / "custom_nodes").mkdir(parents=True)
        (base / "custom_nodes" / "ComfyUI-Sana").symlink_to(pack)
        (base / "models").symlink_to(models)
        command = [
            sys.executable, str(comfyui / "main.py"), "--port", str(self.port), "--base-directory", str(base),
            "--preview-method", "latent2rgb", "--disable-api-nodes", "--disable-auto-launch",
            "--database-url", "sqlite:///:memory:", *options,
        ]  # fmt: skip
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=base, stdout=log, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ComfyUI ended while starting:\n{self.text()[-4000:]}"
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise TimeoutError(f"ComfyUI was not up after {START_TIMEOUT} s:\n{self.text()[-4000:]}")

    def text(self) -> str:
        """The server's log."""
        return self.log.read_text(errors="replace")

    def read(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return response.read().decode()

    def get(self, path: str):
        return json.loads(self.read(path))

    def run(self, graph: "Graph | dict", interrupt_at: int | None = None) -> Run:
        """Queue a workflow in API format and follow it to its end; interrupt it at a step."""
        workflow = graph.nodes if isinstance(graph, Graph) else graph
        return asyncio.run(asyncio.wait_for(self._run(workflow, interrupt_at), RUN_TIMEOUT))

    async def _run(self, workflow: dict, interrupt_at: int | None) -> Run:
        client = uuid.uuid4().hex
        address = f"http://127.0.0.1:{self.port}"
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{address}/ws?clientId={client}", max_msg_size=0) as websocket:
                queued = {"prompt": workflow, "client_id": client}
                async with session.post(f"{address}/prompt", json=queued) as response:
                    answer = await response.json()
                    if response.status != 200:
                        raise Refused(json.dumps(answer))
                run = Run()
                async for message in websocket:
                    if message.type == aiohttp.WSMsgType.BINARY:
                        kind, content = int.from_bytes(message.data[:4], "big"), message.data[4:]
                        run.previews += kind in (1, 4)
                        if kind == 3:
                            end = 4 + int.from_bytes(content[:4], "big")
                            run.texts[content[4:end].decode()] = content[end:].decode()
                        continue
                    event = json.loads(message.data)
                    data = event.get("data", {})
                    if data.get("prompt_id") != answer["prompt_id"]:
                        continue
                    if event["type"] == "executed":
                        run.outputs[data["node"]] = data["output"] or {}  # nothing where the cache was enough
                    elif event["type"] == "progress":
                        run.progress.append(data["value"])
                        if data["value"] == interrupt_at:
                            await session.post(f"{address}/interrupt")
                    elif event["type"] == "execution_error":
                        run.error = data
                    elif event["type"] == "execution_interrupted":
                        run.interrupted = True
                    elif event["type"] == "executing" and data["node"] is None:
                        return run  # sent last, after errors too, when the queue has let go of the workflow
                    elif event["type"] == "executing":
                        run.ran.append(data["node"])
        raise ConnectionError("the websocket was closed before the workflow ended")

    def images(self, run: Run) -> list[Image.Image]:
        """The pictures that SaveImage wrote."""
        entries = [entry for output in run.outputs.values() for entry in output.get("images", [])]
        return [Image.open(self.base / entry["type"] / entry["subfolder"] / entry["filename"]) for entry in entries]

    def latents(self, run: Run):
        """The tensors that SaveLatent wrote."""
        entries = [entry for output in run.outputs.values() for entry in output.get("latents", [])]
        return [
            load_file(self.base / entry["type"] / entry["subfolder"] / entry["filename"])["latent_tensor"]
            for entry in entries
        ]


class Graph:
    """A workflow in API format, written as calls: `graph.add("KSampler", model=loader, ...)` returns its output."""

    def __init__(self):
        self.nodes: dict[str, dict] = {}
        self._ids = itertools.count(1)

    def add(self, class_type: str, output: int = 0, **inputs) -> list:
        node = str(next(self._ids))
        self.nodes[node] = {"class_type": class_type, "inputs": inputs}
        return [node, output]

    def remove(self, class_type: str) -> None:
        self.nodes = {node: entry for node, entry in self.nodes.items() if entry["class_type"] != class_type}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
