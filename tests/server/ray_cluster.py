"""A Ray cluster of this machine, whose nodes are processes that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STORE_BYTES = 80 << 20
"""The least that Ray takes for a node's objects."""


@contextmanager
def ray_cluster(num_nodes: int, num_cpus: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster with a head that runs no ranks.

    Args:
        num_nodes: beside the head.
        num_cpus: of each.
    Returns:
        A context that gives the cluster, and its nodes beside the head.
    """
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster, [add_node(cluster, num_cpus) for _ in range(num_nodes)]
    finally:
        cluster.shutdown()


def add_node(cluster: Any, num_cpus: int) -> Any:
    """One more."""
    return cluster.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES)
