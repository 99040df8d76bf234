"""`equipoise serve`: requests over HTTP."""

from __future__ import annotations

import typer

from equipoise.cli import serve_options as options
from equipoise.cli.serve_options import Balancing, Http, Limits, Ranks, Ray


def serve(
    context: typer.Context,
    words: options.Words = None,
    ranks: options.NumRanks = None,
    dtype: options.DType = "float32",
    device: options.Device = "auto",
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    name: options.Name = None,
    log: options.Log = None,
    log_prompts: options.LogPrompts = False,
    log_health: options.LogHealth = False,
    batch_size: options.BatchSize = 16,
    max_len: options.MaxLen = None,
    queue: options.Queue = 256,
    max_body: options.MaxBody = 1 << 20,
    request_timeout: options.RequestTimeout = 600.0,
    drain_timeout: options.DrainTimeout = 30.0,
    timeout: options.Timeout = 30.0,
    launcher: options.Launcher = None,
    interface: options.Interface = None,
    socket: options.Socket = None,
    state: options.State = None,
    orphan: options.Orphan = None,
    slots_per_rank: options.SlotsPerRank = None,
    respawn: options.Respawn = False,
    silence: options.Silence = 10.0,
    ray_address: options.RayAddress = "auto",
    ray_place: options.RayPlace = "spread",
    ray_cpus: options.RayCpus = 1.0,
    ray_wait: options.RayWait = 60.0,
    redundant_experts: options.RedundantExperts = None,
    policy: options.Policy = None,
    step_interval: options.StepInterval = None,
    sync: options.Sync = False,
    no_balance: options.NoBalance = False,
    config: options.ConfigFile = None,
    eplb_config: options.EplbConfig = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it, on ranks that may come and go.

    Keys are read from EQ_API_KEY and EQ_ADMIN_KEY, or from the files that EQ_API_KEY_FILE and
    EQ_ADMIN_KEY_FILE name. The log has a line of JSON for each request. SIGTERM lets requests in
    flight finish. Ranks are processes of this machine, of torchrun's, or actors of a Ray cluster.
    """
    from equipoise.cli.serve_start import start

    http = Http(host, port, name, log, log_prompts, log_health)
    limits = Limits(batch_size, max_len, queue, max_body, request_timeout, drain_timeout, timeout)
    where = Ranks(
        ranks, launcher, interface, socket, state, orphan, slots_per_rank, respawn, silence
    )
    ray = Ray(ray_address, ray_place, ray_cpus, ray_wait)
    balancing = Balancing(
        redundant_experts, policy, step_interval, sync, no_balance, config, eplb_config
    )
    start(context, words or [], dtype, device, http, limits, where, ray, balancing)
