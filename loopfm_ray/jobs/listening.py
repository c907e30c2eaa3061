"""Which programs of this machine listen on which address, as the kernel tells it in `/proc` (Linux)."""

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Listener", "listeners"]

_LISTEN = "0A"
_SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True)
class Listener:
    """One listening TCP socket; `pid` and `command` are None and empty where its process is another user's."""

    host: str
    port: int
    pid: int | None
    command: str

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine reaches it."""
        address = ipaddress.ip_address(self.host)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback


def listeners(proc: Path = Path("/proc")) -> list[Listener]:
    """Return the listening TCP sockets, by port; none where there is no `/proc`."""
    sockets: dict[str, tuple[str, int]] = {}
    for name in ("tcp", "tcp6"):
        sockets |= dict(_sockets(proc / "net" / name))
    owners = dict(_owners(proc, set(sockets)))
    found = [
        Listener(host, port, *owners.get(inode, (None, "")))
        for inode, (host, port) in sockets.items()
    ]
    return sorted(found, key=lambda one: (one.port, one.host))


def _sockets(table: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """Give inode, address and port of what listens."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN:
            address, _, port = fields[1].partition(":")
            yield fields[9], (_address(address), int(port, 16))


def _address(text: str) -> str:
    """Return an address from the kernel's form: words of four bytes, each in the byte order of the machine."""
    data = bytes.fromhex(text)
    words = [data[begin : begin + 4][::-1] for begin in range(0, len(data), 4)]
    return str(ipaddress.ip_address(b"".join(words)))


def _owners(proc: Path, inodes: set[str]) -> Iterator[tuple[str, tuple[int, str]]]:
    """Give inode, process id and command line of the sockets whose process may be looked into."""
    for folder in proc.iterdir() if proc.is_dir() else ():
        if not folder.name.isdecimal():
            continue
        try:
            links = list((folder / "fd").iterdir())
            command = (folder / "cmdline").read_bytes()
        except OSError:  # another user's, or gone by now
            continue
        text = command.replace(b"\0", b" ").decode(errors="replace").strip()
        for link in links:
            match = _SOCKET.fullmatch(_target(link))
            if match and match[1] in inodes:
                yield match[1], (int(folder.name), text)


def _target(link: Path) -> str:
    """Return where a link points; empty when it is gone, as that of the very folder that was listed."""
    try:
        return str(link.readlink())
    except OSError:
        return ""
