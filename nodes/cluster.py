"""A cluster's model and generator as ComfyUI's nodes take them.

What it needs is imported when a graph asks for a cluster. Ray is not: clients join through a process of their own.
"""

import json

from ..hywu_core.generator.handle import GeneratorHandle
from ..hywu_core.handle import ModelHandle
from . import host


def model(placement: str, name: str) -> ModelHandle:
    """The backbone that is served at an address. Raises ClusterError if it is not the one that the graph asks for."""
    client = _client(placement)
    client.check_served(name)
    return client.model()


def generator(placement: str, name: str) -> GeneratorHandle:
    """The generator that is served at an address. Raises ClusterError if it is not the one that the graph asks for."""
    client = _client(placement)
    client.check_generator(name)
    return client.generator()


def serving(placement: str) -> str:
    """Changes when another service, or one of other weights, answers at the address."""
    return json.dumps(_client(placement).identity())


def _client(placement: str):
    from ..hywu_core.cluster.client import client_of

    return client_of(placement, host.say)
