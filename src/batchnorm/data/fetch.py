"""Download a file from the first mirror that has it, whole and with the right checksum."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CONNECT_TIMEOUT_S = 15
READ_TIMEOUT_S = 60
MAX_BYTES = 1 << 30
"""Of a file; a server that goes on sending is left."""


def md5_of(path: str | Path) -> str:
    """The file's md5 as 32 lower-case hex digits; used to tell damage, not malice."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def fetch(name: str, mirrors: Sequence[str], md5: str, folder: Path, *, progress: bool = True) -> Path:
    """Download `name` into `folder`; what stands there already is replaced only by a whole file.

    Args:
        name: File name, appended to each mirror's address.
        mirrors: Addresses ending in a slash, tried in order.
        md5: Checksum that the file must have, 32 hex digits.
        folder: Where it goes; made if absent.
        progress: Draw a progress bar on standard error when that is a terminal.

    Returns:
        The path of the file.

    Raises:
        ConnectionError: No mirror delivered; the message has each mirror's own reason.
        ValueError: Every mirror delivered a file with another checksum.
        ImportError: pooch is not installed.
        OSError: The folder cannot be written.
    """
    try:
        import requests
        from pooch import HTTPDownloader
    except ImportError as error:
        raise ImportError('Downloading needs pooch: pip install "batchnorm[train]"') from error

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    # The process id keeps two downloads of the same file out of each other's way.
    partial = folder / f".{name}.{os.getpid()}.partial"
    failures: list[tuple[str, Exception]] = []
    try:
        for mirror in mirrors:
            url = mirror + name
            try:
                with _ProgressBar(name, shown=progress) as bar:
                    _download(HTTPDownloader, url, partial, bar)
                found = md5_of(partial)
                if found != md5:
                    raise ValueError(f"wrong checksum: md5 {found}, published {md5}")
            except (requests.RequestException, ValueError) as error:
                failures.append((url, error))
                continue
            os.replace(partial, path)
            return path
    finally:
        partial.unlink(missing_ok=True)
    reasons = "\n".join(f"  {url}: {error}" for url, error in failures)
    all_delivered = all(type(error) is ValueError for _, error in failures)
    raise (ValueError if all_delivered else ConnectionError)(
        f"{name} could not be downloaded:\n{reasons}\n"
        f"Check the network and try again, or fetch it by other means and put it at {path} (md5 {md5})."
    )


def _download(downloader: Callable[..., Any], url: str, path: Path, bar: "_ProgressBar") -> None:
    with ExitStack() as opened:

        def close_at_the_end(response: Any, *_: Any, **__: Any) -> None:
            opened.callback(response.close)

        download = downloader(
            progressbar=bar,
            chunk_size=1 << 16,
            timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
            # The file itself is gzip: a server must not wrap it once more.
            headers={"Accept-Encoding": "identity"},
            # pooch leaves the connection of a failed download open.
            hooks={"response": close_at_the_end},
        )
        download(url, str(path), None)


class _ProgressBar:
    """What pooch asks of a progress bar (`total`, `update`, `reset`, `close`), drawn by rich."""

    def __init__(self, name: str, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self.total = 0
        self._done = 0
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> "_ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def reset(self) -> None:
        self._done = 0

    def update(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes came, and no file of ours has as many")
        self._bar.update(self._task, completed=self._done, total=self.total or None)

    def close(self) -> None:
        self._bar.refresh()
