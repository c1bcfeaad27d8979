import hashlib
import http.server
import socket
import threading

import pytest

from batchnorm.data.fetch import fetch, md5_of

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/good/"):
            self.answer(CONTENT, len(CONTENT))
        elif self.path.startswith("/damaged/"):
            self.answer(b"x" + CONTENT[1:], len(CONTENT))
        elif self.path.startswith("/cut/"):
            self.answer(CONTENT[:1000], len(CONTENT))
        else:
            self.send_error(404)

    def answer(self, content, announced):
        self.send_response(200)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def refused():
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_download_makes_the_folder_and_leaves_one_file(server, tmp_path):
    folder = tmp_path / "deep" / "mnist"
    path = fetch("a.gz", [f"{server.url}/good/"], MD5, folder)
    assert path == folder / "a.gz"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == ["a.gz"]
    assert md5_of(path) == MD5


def test_mirrors_are_tried_in_order_until_one_is_good(server, refused, tmp_path):
    mirrors = [
        f"{refused}/",
        *(f"{server.url}/{kind}/" for kind in ("absent", "cut", "damaged", "good", "unused")),
    ]
    path = fetch("a.gz", mirrors, MD5, tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.requests == ["/absent/a.gz", "/cut/a.gz", "/damaged/a.gz", "/good/a.gz"]


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        pytest.param(
            "damaged", ValueError, "wrong checksum: md5 [0-9a-f]{32}, published " + MD5, id="wrong checksum"
        ),
        pytest.param("absent", ConnectionError, "404", id="404"),
        pytest.param("cut", ConnectionError, "[Ii]ncomplete|1000", id="connection cut"),
    ],
)
def test_failure_names_address_reason_and_place_and_keeps_what_was_there(
    server, tmp_path, kind, error, reason
):
    (tmp_path / "a.gz").write_bytes(b"earlier")
    mirror = f"{server.url}/{kind}/"
    with pytest.raises(error, match=reason) as caught:
        fetch("a.gz", [mirror], MD5, tmp_path)
    message = str(caught.value)
    assert mirror + "a.gz" in message
    assert str(tmp_path / "a.gz") in message
    assert MD5 in message
    assert (tmp_path / "a.gz").read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gz"]


def test_no_network_is_a_connection_error_that_lists_every_mirror(refused, tmp_path):
    mirrors = [f"{refused}/one/", f"{refused}/two/"]
    with pytest.raises(ConnectionError, match="put it at") as caught:
        fetch("a.gz", mirrors, MD5, tmp_path)
    assert all(mirror + "a.gz" in str(caught.value) for mirror in mirrors)
    assert not list(tmp_path.iterdir())
