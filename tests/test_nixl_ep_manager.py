"""The owner of the NIXL-EP buffer: its states, its lock, what it refuses; and NIXL-EP's own."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
from equipoise.errors import ConfigError, MembershipError, TransferError
from tests.fake_nixl_ep import FakeBuffer, FakeFabric, FakeKernels
from tests.test_nixl_ep import CPU, SHAPE


class ManagerFactory:
    """Managers of one rank, over the fake or, on a GPU, over NIXL-EP itself."""

    def __init__(self, *, real: bool) -> None:
        self.real = real
        self.fabric = FakeFabric()
        self.made: list[NixlEPAll2AllManager] = []

    def __call__(self, *, max_ranks: int = 4, index: int = 0) -> NixlEPAll2AllManager:
        manager = NixlEPAll2AllManager(
            max_ranks,
            torch.device("cuda") if self.real else CPU,
            timedelta(seconds=0.5),
            index=index,
            kernels=None if self.real else FakeKernels(self.fabric),
        )
        self.made.append(manager)
        return manager


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def make_manager(request: pytest.FixtureRequest) -> Iterator[ManagerFactory]:
    factory = ManagerFactory(real=request.param == "real")
    yield factory
    for manager in factory.made:
        manager.close()


def test_the_same_handle_is_handed_out_and_what_does_not_fit_is_refused(
    make_manager: ManagerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make_manager()
    handle = manager.get_handle(**SHAPE)
    said = r"NIXL-EP takes \d+\.\d\d GB of device memory: 16 tokens x 2048 of each of 4 ranks"
    assert len(re.findall(said, caplog.text)) == 1
    assert manager.get_handle(**SHAPE) is handle
    assert (handle.max_tokens, handle.hidden_size) == (16, 2048)
    smaller = manager.get_handle(**{**SHAPE, "max_num_tokens_per_dp_rank": 7})
    assert smaller.max_tokens == 8
    assert len(re.findall(said, caplog.text)) == 1
    with pytest.raises(ConfigError, match=r"need .* bytes of the NIXL-EP buffer, which has"):
        manager.get_handle(**{**SHAPE, "max_num_tokens_per_dp_rank": 64})
    with pytest.raises(ConfigError, match="is for 3 slots per rank, not 4"):
        manager.get_handle(**{**SHAPE, "num_experts_per_rank": 4})
    with pytest.raises(ConfigError, match="hidden size of 9000 is above 8192"):
        manager.get_handle(**{**SHAPE, "token_hidden_size": 9000})
    manager.close()
    with pytest.raises(MembershipError, match="was closed"):
        manager.get_handle(**{**SHAPE, "max_num_tokens_per_dp_rank": 12})


def test_states_are_gone_through_in_order(make_manager: ManagerFactory) -> None:
    manager = make_manager()
    with pytest.raises(MembershipError, match="get_handle comes first"):
        manager.commit((0,))
    manager.get_handle(**SHAPE)
    manager.commit((0,))
    with pytest.raises(MembershipError, match=r"\[1\] .* not connected: stage them first"):
        manager.commit((0, 1))
    with pytest.raises(MembershipError, match=r"\[0\] .* members of the generation that serves"):
        manager.disconnect((0,))
    with pytest.raises(MembershipError, match=r"index 4 does not fit .* at least 5"):
        manager.commit((0, 4))
    with pytest.raises(MembershipError, match="must differ, and hold this rank's own index 0"):
        manager.commit((1, 2))
    with pytest.raises(ConfigError, match=r"index 7 does not fit .* sized for 4 ranks"):
        make_manager(index=7)
    with pytest.raises(ConfigError, match="max_ranks must be at least 1, got 0"):
        make_manager(max_ranks=0)


def test_a_buffer_of_many_ranks_is_rounded_up_to_whole_nodes(
    make_manager: ManagerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make_manager(max_ranks=9, index=8)
    manager.get_handle(**SHAPE)
    assert "of each of 16 ranks" in caplog.text
    manager.commit((8,))
    assert manager.find_lost() == []


def test_the_lock_is_waited_for_no_longer_than_the_deadline(
    make_manager: ManagerFactory,
) -> None:
    manager = make_manager()
    manager.get_handle(**SHAPE)
    manager.commit((0,))
    held, let_go = threading.Event(), threading.Event()

    def hold(_: FakeBuffer) -> None:
        held.set()
        let_go.wait(30)

    thread = threading.Thread(target=lambda: manager.use((0,), hold))  # type: ignore[arg-type]
    thread.start()
    held.wait(30)
    with pytest.raises(TransferError, match=r"was not free within 0\.5 s"):
        manager.find_lost()
    let_go.set()
    thread.join(30)
    assert manager.find_lost() == []
