"""A page of ComfyUI's real front end in Debian's Chromium."""

import os
import shutil

import pytest

from tests.comfy.server import Server
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def address(comfyui, chromium, tiny_models, tmp_path_factory):
    """Where a ComfyUI listens that has the models of the pack and a tiny one."""
    server = Server(comfyui, tmp_path_factory.mktemp("comfyui"), ROOT, tiny_models, "--cpu")
    try:
        server.wait_until_up()
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.stop()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser."""
    path = shutil.which("chromium")
    if path is None:
        reason = "No chromium. On Debian, as root: apt-get install chromium."
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(f"*** THE FRONT END IS NOT TESTED *** {reason}")
    return path


@pytest.fixture(scope="module")  # not longer: Playwright's event loop would stand in the way of other tests
def browser(address, chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(address, browser):
    """The front end, ready, without the tutorial that covers a first visitor's canvas."""
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.request.post(f"{address}/api/settings/Comfy.TutorialCompleted", data="true")
    page.goto(address)
    page.wait_for_function("window.app?.isGraphReady", timeout=60_000)
    yield page
    page.close()
