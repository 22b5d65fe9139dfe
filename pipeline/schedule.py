"""``capfilt schedule``: rounds that begin by themselves once there is enough new data.

A firing takes new source files, and goes round once if they, with what earlier firings left
waiting, bring enough rows; a round that an earlier firing did not end is ended first, and is then
the round of this one. Where it stands follows from records and plans alone, so nothing is owed for
a firing that never came: the next one finds all that has arrived, and takes it at once.
"""

from __future__ import annotations

from pipeline import preflight
from pipeline.config import RunConfig
from pipeline.progress import Screen
from pipeline.rounds import check_places, go_round, opened
from pipeline.runfolder import read_rounds
from pipeline.sources import Shards, ingest
from pipeline.store import Store


def fire(config: RunConfig, screen: Screen) -> bool:
    """One firing. Returns whether it went round; ``rounds.count`` does not matter.

    Raises:
        LeaseHeldError: another driver is at work.
        UserError, RunError: as `pipeline.rounds.run`; the models that are promoted stay so.
    """
    check_places(config)
    preflight.check_stays(config.run)
    for field in preflight.check_sources(config, awaited=True):
        screen.note(f"{field}: no file there yet")
    with opened(config, screen) as (filled, store, world):
        number = due(filled, store, ingest(filled, store), screen)
        if number is None:
            return False
        preflight.check_models(config)  # takes long, and most firings have nothing to do
        rounds = filled.rounds.model_copy(update={"count": number})
        go_round(filled.model_copy(update={"rounds": rounds}), store, screen, world)
    return True


def due(config: RunConfig, store: Store, shards: Shards, screen: Screen) -> int | None:
    """The round that a firing must end or begin, or None. ``shards`` are all that are cut.

    Round 0, where the run starts from nothing, is part of round 1; where it starts from released
    models, that of their measurement has no shards.
    """
    rounds = [round_ for round_ in read_rounds(store) if round_.shards]
    last = rounds[-1] if rounds else None
    if last is not None and last.number >= config.first_round:
        gate = last.records["gate"][0]
        if last.number == 0 or not store.exists(gate):
            screen.note(f"round {last.number} was begun before")
            return max(1, last.number)
    taken = last.shards if last is not None else {}
    new = store.read_records(record for name, (_, record) in shards.items() if name not in taken)
    rows = sum(record.counts["rows"] for record in new)
    if {kind for kind, _ in shards.values()} == {"human"} and _web_wanted(config):
        rows = 0  # the first file of `sources` is still to come
    needed = config.schedule.min_new_rows
    if rows < needed:
        screen.note(f"no round: {rows} new rows, schedule.min_new_rows is {needed}")
        return None
    screen.note(f"{rows} new rows")
    return 1 if last is None else last.number + 1


def _web_wanted(config: RunConfig) -> bool:
    return any(source.kind != "human" for source in config.sources)
