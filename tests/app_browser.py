"""The page of `stimg app` in a headless Chromium, and its screenshots for docs/app.md:

    python tests/app_browser.py --model MODEL --slide slide.h5ad --output docs/images --gene GENE --num-domains 7

The browser and its driver are Debian's packages `chromium` and `chromium-driver`; Selenium is of the extra `dev`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

ROOT = Path(__file__).parents[1]
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--window-size=1280,1000", "--hide-scrollbars", "--force-color-profile=srgb"),
)
PATIENCE = 120.0  # seconds for anything on the page, on a busy machine
# A map is drawn when its image is decoded.
_DRAWN = "const i = document.querySelector('#{0} img'); return i && i.complete && i.naturalWidth > 0 ? i.src : null"


def missing() -> str:
    """What is lacking to drive a browser, "" where nothing is."""
    lacking = [f"the Python package {name}" for name in ("gradio", "selenium") if find_spec(name) is None]
    lacking += [f"{name} on the path" for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return ", ".join(lacking)


@contextmanager
def running_app(model: Path | str, temporary: Path, patience: float = PATIENCE) -> Iterator[tuple[str, Any]]:
    """`stimg app` in a process of its own, whose temporary files go to `temporary`: its address, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "modeling_stimg.cli", "app", "--model", str(model), "--port", str(port)]
    address = f"http://127.0.0.1:{port}/"
    process = subprocess.Popen(
        [*command, "--quiet"], env=environment, cwd=temporary, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        wait(lambda: process.poll() is not None or _answers(address), "an answer of the page", patience)
        if process.poll() is not None:
            raise RuntimeError(f"stimg app ended: {process.stderr.read()}")
        yield address, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait(condition: Callable[[], Any], what: str, patience: float) -> Any:
    """What the condition gives, as soon as it is something."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"waited {patience:.0f} s for {what}")


class Page:
    """The page, and what a user does on it."""

    def __init__(self, driver: Any, address: str, downloads: Path, patience: float) -> None:
        self.driver, self.downloads, self.patience = driver, downloads, patience
        driver.get(address)
        self.until("return document.querySelector('#upload input[type=file]') !== null", "the page")

    def script(self, code: str) -> Any:
        return self.driver.execute_script(code)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        return wait(condition, what, self.patience)

    def until(self, code: str, what: str) -> Any:
        """What a script returns, as soon as it is something."""
        return self.wait(lambda: self.script(code), what)

    def element(self, css: str) -> Any:
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, css)

    def drop(self, path: Path) -> None:
        """Give a file to the box; it is empty again when the server has looked at it."""
        self.until("return document.querySelector('#upload input[type=file]') !== null", "an empty box")
        self.element("#upload input[type=file]").send_keys(str(path))

    def click(self, name: str) -> None:
        """Press a button, once it may be pressed."""
        css = f"#{name} button, button#{name}, a#{name}"
        self.script(f"document.querySelector('#{name}').scrollIntoView({{block: 'center'}})")
        self.element(css).click()

    def map(self, name: str, before: str | None = None) -> str:
        """The image of a map, another one than `before`, as a data address."""
        return self.wait(
            lambda: (source := self.script(_DRAWN.format(name))) and source != before and source, f"the map {name}"
        )

    def text(self, name: str) -> str:
        return self.script(f"return document.querySelector('#{name}').innerText")

    def choose(self, name: str, value: str) -> None:
        """Type into a list and take what is there by that name."""
        from selenium.webdriver.common.keys import Keys

        self.script(f"document.querySelector('#{name}').scrollIntoView({{block: 'center'}})")
        field = self.element(f"#{name} input")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value)
        field.send_keys(Keys.ENTER)

    def type(self, name: str, value: str) -> None:
        """Type a number beside a slider."""
        from selenium.webdriver.common.keys import Keys

        field = self.element(f"#{name} input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value, Keys.TAB)

    def complaint(self) -> str:
        """What the page says in its corner; then it is waved away."""
        said = self.until(
            "const t = document.querySelector('.toast-body'); return t && t.innerText.trim()", "a complaint"
        )
        self.script("document.querySelectorAll('.toast-close').forEach(b => b.click())")
        self.until("return document.querySelector('.toast-body') === null", "the complaint to go")
        return said

    def download(self) -> Path:
        """Press the button that downloads, and wait for the whole file."""
        self.until("return !document.querySelector('#download button, button#download').disabled", "a file")
        self.click("download")
        (path,) = self.wait(
            lambda: [p for p in self.downloads.iterdir() if not p.name.startswith(".") and p.suffix == ".h5ad"],
            "the download",
        )
        return path

    def asked_hosts(self) -> set[str]:
        """Hosts that the browser asked for anything since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).hostname for url in asked if url.startswith("http")}


@contextmanager
def opened_page(address: str, temporary: Path, patience: float = PATIENCE) -> Iterator[Page]:
    """The page in a browser of its own, whose profile and downloads lie in `temporary`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    downloads = temporary / "downloads"
    downloads.mkdir()
    options = webdriver.ChromeOptions()
    for option in (*OPTIONS, f"--user-data-dir={temporary / 'profile'}"):
        options.add_argument(option)
    options.binary_location = shutil.which("chromium")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield Page(driver, address, downloads, patience)
    finally:
        driver.quit()


def shoot(page: Page, name: str, path: Path) -> None:
    """What the window shows, with a part of the page at its top, as a PNG of 256 colours."""
    from PIL import Image

    page.script(f"document.querySelector('#{name}').scrollIntoView({{block: 'start'}}); window.scrollBy(0, -60)")
    time.sleep(0.5)  # what moves or fades in has come to rest
    with Image.open(BytesIO(page.driver.get_screenshot_as_png())) as image:
        # Of the ways to fewer colours the one that leaves rare ones, such as the ends of a scale, as they are.
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a model with its decoder.")],
    slide: Annotated[Path, typer.Option(help="An .h5ad, or a zipped Space Ranger folder.")],
    output: Annotated[Path, typer.Option(help="Folder for app_tissue.png, app_domains.png and app_gene.png.")],
    gene: Annotated[str | None, typer.Option(help="Which gene; default: the most variable.")] = None,
    num_domains: Annotated[int, typer.Option(help="How many domains; 0: as many as there are.")] = 0,
    side: Annotated[int, typer.Option(help="Side of the hidden square, in sites.", min=1)] = 8,
    patience: Annotated[float, typer.Option(help="Seconds to wait for anything.")] = 600.0,
) -> None:
    """Write screenshots of the page with a slide on it."""
    if missing():
        raise typer.BadParameter(f"lacking: {missing()}")
    if not slide.exists():
        raise typer.BadParameter(f"{slide} does not exist: name a slide")
    output.mkdir(parents=True, exist_ok=True)
    folder = str(Path(model).resolve()) if Path(model).is_dir() else model
    with (
        TemporaryDirectory() as temporary,
        running_app(folder, Path(temporary), patience) as (address, _),
        opened_page(address, Path(temporary), patience) as page,
    ):
        page.drop(slide.resolve())
        page.map("tissue")
        shown = page.map("measured")
        shoot(page, "upload", output / "app_tissue.png")
        if num_domains:
            page.type("number", str(num_domains))
        else:
            page.click("automatic")
        page.click("find")
        page.map("domains")
        shoot(page, "automatic", output / "app_domains.png")
        if gene is not None:
            page.choose("gene", gene)
            page.map("measured", before=shown)
        page.type("side", str(side))
        page.click("rebuild")
        page.map("predicted")
        shoot(page, "gene", output / "app_gene.png")


if __name__ == "__main__":
    typer.run(main)
