"""Starts a real ComfyUI, queues the default workflow over HTTP and prints where the picture is; see demo.sh."""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import aiohttp
import torch

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "workflows" / "api" / "sana_nano_text_to_image.json"
OUTPUT = ROOT / "output"
START_TIMEOUT = 300  # seconds; about 25 on two cores, more when the disk is cold


class DemoError(Exception):
    """What to tell the user; the server's last lines are added where they can help."""


class Status:
    """One line that is redrawn on a terminal; in a log, a line for each new stage."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.stage = None

    def show(self, stage, detail=""):
        if self.live:
            print(f"\r\033[K{stage} {detail}", end="", flush=True)
        elif stage != self.stage:
            print(stage, flush=True)
        self.stage = stage

    def end(self, line):
        print(f"\r\033[K{line}" if self.live else line, flush=True)
        self.stage = None


class Server:
    """A ComfyUI in a process of its own, which ends with the `with` block."""

    def __init__(self, comfyui, port):
        self.port = port
        self.log = OUTPUT / "comfyui.log"
        self.command = [sys.executable, "-u", str(comfyui / "main.py"), "--port", str(port), "--disable-auto-launch"]
        self.command += ["--disable-api-nodes", "--output-directory", str(OUTPUT)]
        if not torch.cuda.is_available():
            self.command.append("--cpu")

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        OUTPUT.mkdir(exist_ok=True)
        with open(self.log, "w") as log:
            # A session of its own: Ctrl-C reaches this process first, which then ends the server in order.
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_lines(self, count=25):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    async def wait_until_up(self, session, status):
        started = time.monotonic()
        while (seconds := time.monotonic() - started) < START_TIMEOUT:
            if self.process.poll() is not None:
                raise DemoError(f"ComfyUI ended with status {self.process.returncode} before it was up.")
            status.show(f"Starting ComfyUI{' on the CPU' if '--cpu' in self.command else ''} ...", f"{seconds:.0f} s")
            try:
                async with session.get(f"{self.address}/system_stats") as response:
                    if response.ok:
                        status.end(f"ComfyUI is up at {self.address} after {seconds:.0f} s")
                        return
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.5)
        raise DemoError(f"ComfyUI was not up after {START_TIMEOUT} s.")


def free_port(wanted):
    """Returns `wanted` when nothing listens there, else any free port."""
    for port in (wanted, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return listener.getsockname()[1]
    raise DemoError("No free port on 127.0.0.1.")


def load_workflow(prompt, seed):
    """Reads the default workflow in API format; returns it with the wanted prompt and seed, and the prompt it holds."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    sampler = next(node for node in workflow.values() if node["class_type"] == "SanaSampler")
    positive = workflow[sampler["inputs"]["positive"][0]]
    if prompt is not None:
        positive["inputs"]["text"] = prompt
    if seed is not None:
        sampler["inputs"]["seed"] = seed
    return workflow, positive["inputs"]["text"]


def explain_refusal(answer):
    """The sentences in ComfyUI's answer to a workflow that it does not run."""
    errors = [
        f"{node['class_type']}: {error['message']}: {error['details']}"
        for node in answer["node_errors"].values()
        for error in node["errors"]
    ]
    return "\n  ".join([f"ComfyUI refused the workflow: {answer['error']['message']}", *errors])


async def queue_workflow(session, server, workflow, client_id):
    """Queues the workflow; returns the id of the job."""
    async with session.post(f"{server.address}/prompt", json={"prompt": workflow, "client_id": client_id}) as response:
        answer = await response.json()
        if not response.ok:
            raise DemoError(explain_refusal(answer))
        return answer["prompt_id"]


async def wait_for_images(socket_, prompt_id, workflow, status):
    """Follows the job over the websocket to its end; returns the files it saved."""
    images = []
    async for message in socket_:
        if message.type is not aiohttp.WSMsgType.TEXT:
            continue  # previews are binary
        event = json.loads(message.data)
        kind, data = event["type"], event.get("data", {})
        if data.get("prompt_id") != prompt_id:
            continue
        if kind == "executing" and data["node"] is None:
            return images
        elif kind == "executing":
            status.show(f"Running {workflow[data['node']]['class_type']} ...")
        elif kind == "progress":
            status.show(f"Running {workflow[data['node']]['class_type']} ...", f"{data['value']}/{data['max']}")
        elif kind == "executed":
            images += [OUTPUT / image["subfolder"] / image["filename"] for image in data["output"].get("images", [])]
        elif kind == "execution_error":
            raise DemoError(f"{data['node_type']} failed: {data['exception_message']}")
    raise DemoError("ComfyUI closed the connection.")


async def draw(server, workflow, status):
    """Queues the workflow on a server that is starting; returns the pictures' paths and the seconds they took."""
    client_id = uuid.uuid4().hex
    async with aiohttp.ClientSession() as session:
        await server.wait_until_up(session, status)
        async with session.ws_connect(f"{server.address}/ws?clientId={client_id}", max_msg_size=0) as socket_:
            started = time.monotonic()
            prompt_id = await queue_workflow(session, server, workflow, client_id)
            images = await wait_for_images(socket_, prompt_id, workflow, status)
    if not images:
        raise DemoError("The workflow ended without a picture.")
    return images, time.monotonic() - started


def parse_arguments():
    parser = argparse.ArgumentParser(prog="bash scripts/demo.sh", description=__doc__)
    parser.add_argument("--prompt", help="what to draw (default: the workflow's own prompt)")
    parser.add_argument("--seed", type=int, help="of the noise (default: the workflow's own seed)")
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running until Ctrl-C")
    parser.add_argument("--port", type=int, default=8188, help="another one is taken when this is in use (%(default)s)")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended as well
    status = Status()
    workflow, prompt = load_workflow(arguments.prompt, arguments.seed)
    with Server(Path(os.environ["COMFYUI_PATH"]), free_port(arguments.port)) as server:
        try:
            images, seconds = asyncio.run(draw(server, workflow, status))
            status.end(f'ComfyUI-Sana: drew "{prompt}" in {seconds:.1f} s: {images[0]}')
            if arguments.serve:
                status.end(f"ComfyUI-Sana: ComfyUI runs at {server.address} until you press Ctrl-C")
                server.process.wait()
        except (DemoError, aiohttp.ClientError) as error:
            status.end(f"\nThe last lines of {server.log}:\n{server.last_lines()}\n\nComfyUI-Sana: {error}")
            return 1
        except KeyboardInterrupt:
            status.end("ComfyUI-Sana: stopped")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
