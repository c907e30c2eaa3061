"""What `loopfm doctor` says of open doors, on planted machines; and nothing on a clean one."""

import os
import socket
import sys

import pytest
import yaml

from loopfm_ray.jobs.listening import listeners
from loopfm_ray.jobs.security import examine_security
from loopfm_ray.serving.keys import ApiKeys, add_key, write_keys
from loopfm_ray.serving.rollout import Rollouts, Served, promote, write_rollouts
from tests.tls import make_certificate

EVERYWHERE, LOOPBACK = "00000000", "0100007F"
EVERYWHERE_6, LOOPBACK_6, MAPPED = "0" * 32, "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"
LAN = "0A00020A"  # 10.2.0.10
HEAD = "ray/core/src/ray/gcs/gcs_server --log_dir=x"


class Machine:
    """A made-up `/proc`."""

    def __init__(self, folder):
        self.proc, self.home = folder / "proc", folder / "home"
        (self.proc / "net").mkdir(parents=True)
        self.home.mkdir()
        self._lines = {"tcp": [], "tcp6": []}
        self._number = 100

    def listen(self, address, port, command, auth_mode=None, is_mine=True, state="0A"):
        self._number += 1
        inode, pid = 5000 + self._number, self.proc / str(self._number)
        kind = "tcp6" if len(address) == 32 else "tcp"
        line = f"   0: {address}:{port:04X} {'0' * len(address)}:0000 {state} 00000000:00000000 00:00000000 00000000  0  0 {inode} 1 0"
        self._lines[kind].append(line)
        for name, lines in self._lines.items():
            (self.proc / "net" / name).write_text("\n".join(["  sl  local_address", *lines]) + "\n")
        if is_mine:
            (pid / "fd").mkdir(parents=True)
            (pid / "fd" / "3").symlink_to(f"socket:[{inode}]")
            (pid / "cmdline").write_bytes(command.replace(" ", "\0").encode())
            mode = "" if auth_mode is None else f"\0RAY_AUTH_MODE={auth_mode}"
            (pid / "environ").write_bytes(f"PATH=/bin{mode}".encode())

    def findings(self, *files, **environ):
        return examine_security(files, self.proc, self.home, environ)

    def faults(self, *files, **environ):
        found = [one for one in self.findings(*files, **environ) if not one.is_ok]
        assert all(one.advice for one in found)
        return found


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "machine")


@pytest.fixture
def files(tmp_path):
    """Key file, certificate, private key and rollout file as they should be."""
    folder = tmp_path / "files"
    folder.mkdir(mode=0o755)
    write_keys(folder / "keys.json", add_key(ApiKeys(), "one")[0])
    make_certificate(folder)
    write_rollouts(folder / "rollouts.json", promote(Rollouts(), "vm", Served(bundle="b")))
    (folder / "rollouts.json").chmod(0o644)
    return folder


def config(folder, **settings):
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"bundle": "b", **settings}))
    return path


def deployment(folder, http=None, grpc=None, **args):
    tree = {"applications": [{"name": "loopfm", "args": {"bundle": "b", **args}}]}
    tree |= {} if http is None else {"http_options": http}
    tree |= {} if grpc is None else {"grpc_options": grpc}
    path = folder / "deploy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_clean_local_set_up_has_no_faults(machine, files):
    machine.listen(LOOPBACK, 6379, "redis-server 127.0.0.1:6379")
    machine.listen(MAPPED, 40000, HEAD, "disabled")
    machine.listen(LOOPBACK_6, 40001, "ray::ServeReplica:loopfm:vm", "disabled")
    machine.listen(LOOPBACK, 8000, "ray::ProxyActor", "disabled")
    machine.listen(EVERYWHERE_6, 52285, "ray::RayTrainWorker", "disabled")  # torch's process group
    machine.listen(EVERYWHERE, 22, "sshd")
    machine.listen(EVERYWHERE, 5432, "postgres", is_mine=False)
    machine.listen(EVERYWHERE, 8265, "ray dashboard", state="01")  # a connection, no listener
    serve = config(
        files,
        rollouts=str(files / "rollouts.json"),
        bundle=None,
        api_keys=str(files / "keys.json"),
        tls={"cert": str(files / "cert.pem"), "key": str(files / "key.pem")},
    )
    assert machine.faults(serve) == []
    assert machine.faults(deployment(files, {"host": "127.0.0.1"})) == []
    assert machine.faults() == []


def test_without_proc_there_is_nothing_to_say(tmp_path):
    assert listeners(tmp_path / "none") == []


def test_listeners_are_those_of_the_kernel():
    with socket.socket() as everywhere, socket.socket() as loopback, socket.socket() as busy:
        for one, host in ((everywhere, "0.0.0.0"), (loopback, "127.0.0.1")):
            one.bind((host, 0))
            one.listen()
        busy.bind(("127.0.0.1", 0))  # bound, and not listening
        ports = [one.getsockname()[1] for one in (everywhere, loopback, busy)]
        found = {one.port: one for one in listeners() if one.pid == os.getpid()}
        assert (found[ports[0]].host, found[ports[0]].is_loopback) == ("0.0.0.0", False)
        assert (found[ports[1]].host, found[ports[1]].is_loopback) == ("127.0.0.1", True)
        assert ports[2] not in found
        assert "python" in found[ports[0]].command or sys.executable in found[ports[0]].command
    with socket.socket(socket.AF_INET6) as six:
        six.bind(("::", 0))
        six.listen()
        (one,) = [one for one in listeners() if one.port == six.getsockname()[1]]
        assert (one.host, one.is_loopback) == ("::", False)


@pytest.mark.parametrize("address", [EVERYWHERE, EVERYWHERE_6, LAN])
@pytest.mark.parametrize("mode", ["disabled", None])
def test_a_ray_head_that_others_reach_without_a_token(machine, address, mode):
    machine.listen(address, 6379, HEAD, mode)
    (fault,) = machine.faults()
    assert "the Ray head listens on" in fault.found
    assert "6379" in fault.found
    assert "RAY_AUTH_MODE=token" in fault.advice


def test_a_ray_head_with_a_token_may_be_reached(machine):
    machine.listen(EVERYWHERE, 6379, HEAD, "token")
    assert machine.faults() == []
    assert "RAY_AUTH_MODE is token" in machine.findings()[-1].found


@pytest.mark.parametrize(
    ("port", "command", "says"),
    [
        (8265, "python ray/dashboard/dashboard.py --host=0.0.0.0", "the Ray dashboard"),
        (41000, "ray::ServeReplica:loopfm:vm", "a replica"),
        (41001, "ray/core/src/ray/raylet/raylet --x", "a Ray node"),
        (8000, "ray::ProxyActor", "the proxy of Ray Serve"),
        (8404, "/bin/haproxy -f x", "HAProxy"),
        (6379, "redis-server *:6379", "Redis"),
    ],
)
def test_programs_that_others_reach(machine, port, command, says):
    machine.listen(EVERYWHERE, port, command, "disabled")
    machine.listen(LOOPBACK, port + 1, command, "disabled")
    (fault,) = machine.faults()
    assert says in fault.found
    assert str(port) in fault.found
    assert str(port + 1) not in fault.found


@pytest.mark.parametrize("port", [6379, 8000, 8265])
def test_known_ports_of_another_users_programs(machine, port):
    machine.listen(EVERYWHERE, port, "", is_mine=False)
    (fault,) = machine.faults()
    assert str(port) in fault.found


def test_a_service_with_keys_may_be_reached(machine, files):
    machine.listen(EVERYWHERE, 8000, "ray::ProxyActor", "disabled")
    assert len(machine.faults()) == 1
    guarded = config(files, host="0.0.0.0", api_keys=str(files / "keys.json"))
    assert machine.faults(guarded) == []
    elsewhere = config(files, host="0.0.0.0", port=8001, api_keys=str(files / "keys.json"))
    assert len(machine.faults(elsewhere)) == 1


def test_ha_proxy_mode(machine, files):
    (fault,) = machine.faults(RAY_SERVE_ENABLE_HA_PROXY="1")
    assert fault.name == "HAProxy mode"
    assert "api_keys" in fault.advice
    guarded = config(files, api_keys=str(files / "keys.json"))
    assert machine.faults(guarded, RAY_SERVE_ENABLE_HA_PROXY="1") == []
    assert machine.faults(RAY_SERVE_ENABLE_HA_PROXY="0") == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
@pytest.mark.parametrize("name", ["keys.json", "key.pem"])
def test_key_files_that_others_can_read_or_write(machine, files, name, mode):
    (files / name).chmod(mode)
    settings = {
        "keys.json": {"api_keys": str(files / "keys.json")},
        "key.pem": {"tls": {"cert": str(files / "cert.pem"), "key": str(files / "key.pem")}},
    }[name]
    (fault,) = machine.faults(config(files, **settings))
    assert f"{mode:o}" in fault.found
    assert f"chmod 600 {files / name}" in fault.advice


def test_the_key_of_a_deployment_files_https(machine, files):
    (files / "key.pem").chmod(0o644)
    http = {"host": "127.0.0.1", "ssl_keyfile": str(files / "key.pem")}
    (fault,) = machine.faults(deployment(files, http))
    assert fault.name == str(files / "key.pem")


def test_a_missing_file_is_told(machine, files):
    (fault,) = machine.faults(config(files, api_keys=str(files / "none.json")))
    assert "is not there" in fault.found


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_rollout_file_that_others_can_write(machine, files, mode):
    serve = config(files, bundle=None, rollouts=str(files / "rollouts.json"))
    assert machine.faults(serve) == []
    (files / "rollouts.json").chmod(mode)
    (fault,) = machine.faults(serve)
    assert "decide what is served" in fault.found
    (files / "rollouts.json").chmod(0o644)
    files.chmod(0o777)  # they could put another file in its place
    assert len(machine.faults(serve)) == 1
    files.chmod(0o1777)
    assert machine.faults(serve) == []


def test_rays_token_that_others_can_read(machine):
    token = machine.home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("x")
    token.chmod(0o600)
    assert machine.faults() == []
    token.chmod(0o644)
    (fault,) = machine.faults()
    assert fault.name == str(token)


def test_configs_that_let_others_ask(machine, files):
    keys = str(files / "keys.json")
    for wrong in (
        config(files, host="0.0.0.0"),
        deployment(files, {"host": "10.0.0.3"}),
        deployment(files),  # Serve's own default is every interface
        deployment(files, {"host": "127.0.0.1"}, grpc_port=9000),
    ):
        (fault,) = machine.faults(wrong)
        assert "loopfm key" in fault.found, wrong.read_text()
    for right in (
        config(files, host="0.0.0.0", api_keys=keys),
        deployment(files, {"host": "10.0.0.3"}, api_keys=keys),
        deployment(files, {"host": "10.0.0.3"}, trusted_network=True),
        deployment(files, {"host": "127.0.0.1"}, grpc_port=9000, api_keys=keys),
    ):
        assert machine.faults(right) == []


def test_what_is_no_serve_config_is_told(machine, files):
    broken = files / "broken.yaml"
    for text in ("[", "- 1", "just text", "applications: 3"):
        broken.write_text(text)
        assert len(machine.faults(broken)) == 1
    assert len(machine.faults(files / "none.yaml")) == 1
    assert len(machine.faults(config(files, no_such_key=1))) == 1
