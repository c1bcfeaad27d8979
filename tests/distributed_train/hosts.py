"""Two hosts on one machine: namespaces with a name, a network and processes of their own, and a link between.

A host lives as long as its first process, which reads from a pipe of ours. Should the tests be killed, the
pipe is closed, the process ends, and the kernel takes the host's processes, its network and the link.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

LINK = "link0"
ADDRESSES = {"first": "10.213.77.1", "second": "10.213.77.2"}
NAMESPACES = {"net": "net", "uts": "uts", "mount": "mnt", "pid": "pid_for_children"}


def why_not():
    """What this machine lacks for two hosts; empty if it has all."""
    if not sys.platform.startswith("linux"):
        return "namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [
        name for name in ("ip", "unshare", "nsenter", "mount", "hostname") if shutil.which(name) is None
    ]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2, util-linux, hostname)"
    flags = ["--mount-proc", "--fork", *(f"--{name}" for name in NAMESPACES)]
    tried = subprocess.run(
        ["unshare", *flags, "ip", "link", "add", LINK, "type", "veth", "peer", "name", "link1"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """A name and an address on the link."""

    def __init__(self, name, folder):
        self.name, self.address = name, ADDRESSES[name]
        hosts = folder / f"hosts-of-{name}"
        hosts.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in ADDRESSES.items())
        )
        flags = ["--mount-proc", "--fork", "--kill-child", *(f"--{name}" for name in NAMESPACES)]
        started = ["sh", "-c", 'hostname "$1" && mount --bind "$2" /etc/hosts && echo ready && exec cat']
        self.first = subprocess.Popen(
            ["unshare", *flags, *started, "host", name, str(hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.first.stdout.readline() == "ready\n"

    def start(self, *command, **options):
        """A process there."""
        spaces = [f"--{name}=/proc/{self.first.pid}/ns/{file}" for name, file in NAMESPACES.items()]
        return subprocess.Popen(["nsenter", *spaces, *command], text=True, **options)

    def run(self, *command):
        done = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = done.communicate()
        assert done.returncode == 0, said

    def ip(self, *arguments):
        self.run("ip", *arguments)

    def set(self, variable, value):
        """One of the kernel's variables, of this host's network alone."""
        self.run("sh", "-c", 'echo "$2" > "$1"', "set", f"/proc/sys/{variable.replace('.', '/')}", str(value))

    def processes(self):
        """Command lines of what runs there besides the first process."""
        space = os.readlink(f"/proc/{self.first.pid}/ns/pid_for_children")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns" / "pid") == space:
                    found.append((process / "cmdline").read_text().replace("\0", " ").strip())
        return sorted(command for command in found if command != "cat")

    def end(self):
        self.first.stdin.close()
        self.first.stdout.close()
        self.first.wait(30)


@contextlib.contextmanager
def two_hosts(folder):
    """Two of them and a link."""
    with contextlib.ExitStack() as ends:
        hosts = []
        for name in ADDRESSES:
            hosts.append(Host(name, folder))
            ends.callback(hosts[-1].end)
        first, second = hosts
        # Not from within, where the other one's process has no number.
        inside = ["nsenter", f"--net=/proc/{first.first.pid}/ns/net"]
        other_end = ["peer", "name", LINK, "netns", str(second.first.pid)]
        subprocess.run([*inside, "ip", "link", "add", LINK, "type", "veth", *other_end], check=True)
        for host in hosts:
            host.ip("link", "set", "lo", "up")
            host.ip("address", "add", f"{host.address}/24", "dev", LINK)
            host.ip("link", "set", LINK, "up")
        yield first, second
