"""`troupe worker`: this machine works for a run that is on another."""

import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import click
import mlx.core as mx
import msgspec

from troupe.cli.commands import Number, fail, report_errors
from troupe.cli.worker_lines import Lines
from troupe.cluster.bus import Bus
from troupe.cluster.calls import KINDS
from troupe.cluster.link import DeclinedError, Link
from troupe.cluster.services import OwnCode, Serving
from troupe.cluster.ticket import Ticket, read_ticket
from troupe.cluster.wire import Offer
from troupe.cluster.work import Work
from troupe.errors import ConfigError
from troupe.run.worker.generating import Generating
from troupe.run.worker.machine import asked_machine, chosen_device
from troupe.run.worker.session import Worker
from troupe.run.worker.setup import Here
from troupe.runtime.outlets import unhurried
from troupe.runtime.roles import decisive_fault
from troupe.runtime.terminal import EXIT_BAD_INPUT, EXIT_INTERRUPTED

_OFFERS: tuple[Offer, ...] = ("generate", "rewards", "environments")
_BECAME = {
    "ended": "the run has ended",
    "told": "asked to end; the run knows it",
    "untold": "asked to end; the run could not be told, and will notice",
}


@click.command(short_help="Work for a run that is on another machine.")
@click.option(
    "--join", "file", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The run's join file."
)
@click.option("--device", metavar="cpu|gpu|N", help="What to compute on; N: a card's number.  [default: MLX's choice]")
@click.option("--offers", default="generate", show_default=True, metavar="KINDS", help="Kinds of work, with commas.")
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    metavar="FILE.py:NAME",
    help="Reward of yours that the run may have run here; also MODULE:NAME.",
)
@click.option(
    "--environment",
    "environments",
    multiple=True,
    metavar="FILE.py:NAME",
    help="Environment that it may have run here; also MODULE:NAME, or what an adapter takes.",
)
@click.option("--tool", "tools", multiple=True, metavar="FILE.py:NAME", help="Tool that it may have run here.")
@click.option("-m", "--model", type=click.Path(path_type=Path), metavar="MODEL_DIR", help="Base below an adapter.")
@click.option("--memory-limit", type=Number(min=0, min_open=True), metavar="GB", help="Most that MLX may take.")
@unhurried()
@report_errors
def worker(
    *,
    file: Path,
    device: str | None,
    offers: str,
    rewards: Sequence[str],
    environments: Sequence[str],
    tools: Sequence[str],
    model: Path | None,
    memory_limit: float | None,
) -> None:
    """Work for a run that is on another machine, or on another card of this one, until it ends.

    The run writes the join file: OUT/join/worker.toml with --serve, others with troupe cluster invite. It may be
    started before the run and ended at any time; nothing of it stays. A run sends no code: of rewards and environments
    it gets what is named here, where its own file is the same, and with --offers rewards those of Troupe's own.
    """
    ticket = read_ticket(file)
    chosen_device(device)
    kinds = _kinds(offers)
    code = OwnCode(kinds, rewards, environments, tools)
    if model is not None and not model.is_dir():
        raise ConfigError(f"--model {model}: there is no such folder")
    mx.set_default_device(mx.cpu)  # the card is the generator's, in a process of its own
    lines = Lines()
    here = Here(on_cpu=True, model=model, limit_gb=memory_limit)
    try:
        became = anyio.run(_work, ticket, device, here, kinds, code, lines)
    except DeclinedError as error:
        lines.end()
        fail(f"{file}: {error}", EXIT_BAD_INPUT)
    finally:
        lines.end()
    lines.say(_BECAME[became])
    if became != "ended":
        sys.exit(EXIT_INTERRUPTED)


def _kinds(offers: str) -> tuple[Offer, ...]:
    """The kinds of work that a text lists. ConfigError for another one, or for none."""
    asked = dict.fromkeys(kind.strip() for kind in offers.split(",") if kind.strip())
    for kind in asked:
        if kind not in _OFFERS:
            raise ConfigError(f"--offers {kind}: there are {', '.join(_OFFERS)}")
    if not asked:
        raise ConfigError(f"--offers names no kind of work; there are {', '.join(_OFFERS)}")
    return tuple(kind for kind in _OFFERS if kind in asked)


async def _work(
    ticket: Ticket, device: str | None, own: Here, kinds: Sequence[Offer], code: OwnCode, lines: Lines
) -> str:
    """What became of it, as of `_BECAME`."""
    here, facts = await asked_machine(device)
    here = msgspec.structs.replace(here, model=own.model, limit_gb=own.limit_gb)
    async with _connected(ticket) as bus:
        link = Link(bus, ticket.run, tell=lines.say)
        works: list[Work] = [Generating(bus, ticket.run, here, tell=lines.say)] if "generate" in kinds else []
        works += [Serving(kind, code, tell=lines.say) for kind in KINDS if kind in kinds]
        worker = Worker(link, works, facts, tell=lines.say)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_obey_signals, tasks.cancel_scope)
                tasks.start_soon(lines.follow, worker)
                await worker.run()
                tasks.cancel_scope.cancel()
                return "ended"
        except Exception as error:
            await worker.bye()
            raise decisive_fault(error) from None
        return "told" if await worker.bye() else "untold"


async def _obey_signals(scope: anyio.CancelScope) -> None:
    """The first one has the worker say goodbye."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            scope.cancel()
            return


def _connected(ticket: Ticket) -> AbstractAsyncContextManager[Bus]:
    from troupe.cluster.connection import connect  # here: it needs the extra

    return connect(ticket)
