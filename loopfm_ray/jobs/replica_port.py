"""The port that Ray Serve gives every replica for calls of other deployments, kept off all interfaces but loopback.

Ray Serve 2.60 opens it on `[::]`, at a free port, whatever the address of the node, and unpickles what comes in. With token
authentication it asks for the token; a local cluster has none, for nobody else is to reach it. Serve has no setting for
the address, so the function that opens the port is wrapped in the replica's own process.
"""

import ipaddress
from typing import Any

__all__ = ["keep_on_loopback"]

_EVERYWHERE, _LOOPBACK = "[::]", "127.0.0.1"


def keep_on_loopback(node_ip: str) -> bool:
    """Open the replica's port on loopback alone where the node itself is; return whether it is.

    Call it in the replica's constructor, which runs before the port is opened. On a node with another address other nodes
    have to reach the port, so there it stays as it is.

    Args:
        node_ip: address of this node, as Ray has it.

    Raises:
        AttributeError: this version of Ray Serve opens the port in another way; a replica that can not close it must not start.
    """
    if not ipaddress.ip_address(node_ip).is_loopback:
        return False
    from ray.serve._private import replica

    original = replica.add_port_to_grpc_server

    def add_port(server: Any, address: str) -> int:  # Any: a server of grpc
        return int(original(server, address.replace(_EVERYWHERE, _LOOPBACK)))

    replica.add_port_to_grpc_server = add_port
    return True
