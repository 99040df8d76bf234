"""`equipoise serve --launcher ray`: ranks on the nodes of a cluster, which come and go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from equipoise.errors import ConfigError, DependencyError
from equipoise.launch.ray_actor import find_gpu
from equipoise.launch.ray_cluster import RayOptions, load_ray
from equipoise.server.client import ServerClient, ServerRefused
from tests.command_line import run_command
from tests.server.load import Load
from tests.server.ray_cluster import add_node, ray_cluster
from tests.server.serving import wait_until
from tests.server.test_completions import MAX_TOKENS, plain
from tests.server.test_serve import end, serve

__all__ = ["plain"]

on_ray = pytest.mark.skipif(
    not os.environ.get("SERVER_RAY"), reason="SERVER_RAY asks for it, and needs Ray"
)


@on_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_are_spread_and_nodes_are_lost_and_added(
    tmp_path: Path, plain: dict[str, str]
) -> None:
    with ray_cluster(num_nodes=2, num_cpus=2) as (cluster, (_, second)):
        words = ("--launcher=ray", f"--ray-address={cluster.address}", "--ray-wait=5")
        with serve(tmp_path, "--ranks=2", "--step-interval=8", *words) as (process, url):
            client = ServerClient(url, {})
            with Load(url, plain, MAX_TOKENS) as load:
                load.wait_for_more()
                assert len(find_nodes(client)) == 2
                assert client.placement()["num_nodes"] == 2
                assert client.scale(to=4)["done"]
                assert sorted(map(len, find_nodes(client).values())) == [2, 2]
                load.wait_for_more()
                # The cluster is full: what is asked of it is waited for, and given up in time.
                with pytest.raises(ServerRefused, match="had no room for 1 CPU within 5 s"):
                    client.scale(to=5)
                load.wait_for_more()
                cluster.remove_node(second, allow_graceful=False)
                wait_until(lambda: client.status()["totals"]["recoveries"] == 1)
                load.wait_for_more()
                assert [len(names) for names in find_nodes(client).values()] == [2]
                assert second.node_id not in find_nodes(client)
                third = add_node(cluster, num_cpus=2)
                assert client.scale(to=4)["done"]
                assert len(find_nodes(client)[third.node_id]) == 2
                load.wait_for_more()
                # What a rank leaves behind is another's at once.
                left = find_nodes(client)[third.node_id]
                assert client.scale(remove=left)["done"]
                assert client.scale(to=4)["done"]
                assert len(find_nodes(client)[third.node_id]) == 2
                load.wait_for_more()
            assert load.wrong == []
            assert client.status()["totals"]["failed"] == 0
            end(process)


@on_ray
@pytest.mark.timeout(300)
def test_packed_ranks_share_a_node_and_end_with_their_server(tmp_path: Path) -> None:
    with ray_cluster(num_nodes=2, num_cpus=2) as (cluster, _):
        words = ("--launcher=ray", f"--ray-address={cluster.address}", "--ray-place=pack")
        with serve(tmp_path, "--ranks=2", *words) as (process, url):
            client = ServerClient(url, {})
            assert [len(names) for names in find_nodes(client).values()] == [2]
            pids = [rank["pid"] for rank in client.status()["ranks"]]
            process.kill()
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def find_nodes(client: ServerClient) -> dict[str, list[str]]:
    """Names of ranks that serve, by node."""
    found: dict[str, list[str]] = {}
    for rank in client.status()["ranks"]:
        if rank["state"] == "serving":
            found.setdefault(rank["node"], []).append(rank["name"])
    return found


@on_ray
def test_no_cluster_is_said_in_one_line() -> None:
    done = run_command("serve", "--launcher=ray", "--ray-address=127.0.0.1:1", "--port=0")
    assert (done.code, done.out) == (2, "")
    said = done.err.splitlines()[-1]
    assert said.startswith("equipoise: no Ray cluster at 127.0.0.1:1 (")
    assert said.endswith("start one by `ray start --head`, or name one by --ray-address HOST:PORT")


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("equipoise.launch.ray_cluster.import_module", refuse)
    with pytest.raises(DependencyError, match=r"needs Ray: pip install 'equipoise\[ray\]'"):
        load_ray()


@pytest.mark.parametrize("options", [{"num_cpus": 0}, {"room_s": -1.0}])
def test_impossible_places_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be above 0, got"):
        RayOptions(**options)


@pytest.mark.parametrize(
    ("gpu", "visible", "number"), [("3", None, 3), ("3", "", 3), ("5", "4,5", 1), ("1", "1", 0)]
)
def test_a_gpu_of_rays_is_found_among_those_that_torch_sees(
    gpu: str, visible: str | None, number: int
) -> None:
    assert find_gpu(gpu, visible) == number
