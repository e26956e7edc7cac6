"""`textarena:GAME?option=value`: games of TextArena, alone or against somebody.

Options are arguments of the game, but `opponent`: FILE.py:NAME or MODULE:NAME of a function from what the other player
sees to what it does, for games of two. A row's column `seed` says which game it is, and `player`, 0 or 1, who begins.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from troupe.environments.adapters.options import check_version, load_code, package, read_options
from troupe.environments.convention import StepResult
from troupe.errors import WorldError
from troupe.rewards.faults import described
from troupe.runtime.code_loading import suggestion

PREFIX = "textarena"
_DICE = threading.Lock()
"""Games draw from the one random generator of the module `random`; each gets it as it left it."""

Opponent = Callable[[str], str]


class TextArena:
    """One game: what the policy says is its move, and what it reads is what has happened since.

    The reward comes with the end, 0 before it. A game that has not ended when the episode does is worth 0.
    """

    def __init__(self, make: Callable[[], Any], opponent: Opponent | None) -> None:
        self._make = make
        self._opponent = opponent
        self._game: Any = None
        self._player = 0
        self._dice: Any = None

    def reset(self, seed: int, player: int = 0, **columns: Any) -> str:
        """Begin the game of this seed; its rules, and the board."""
        self._dice = random.Random(seed).getstate()
        self._player = player
        with self._own_dice():
            self._game = self._make()
            self._game.reset(num_players=1 if self._opponent is None else 2, seed=seed)
            done, heard = self._until_own_turn(False)
        if done:
            raise RuntimeError(f"the game of seed {seed} is over before the first move")
        return heard

    def step(self, text: str) -> StepResult:
        """Make a move."""
        with self._own_dice():
            done, _ = self._game.step(action=text)
            done, heard = self._until_own_turn(done)
            if not done:
                return StepResult(heard, 0.0)
            rewards, info = self._game.close()
        own = dict(info.get(self._player) or {})
        return StepResult(None, float((rewards or {}).get(self._player, 0.0)), True, own)

    def _until_own_turn(self, done: bool) -> tuple[bool, str]:
        """Let the other one move while it is its turn → whether the game is over, what there is to read."""
        while not done:
            player, told = self._game.get_observation()
            heard = _as_text(told, player)
            if self._opponent is None or player == self._player:
                return False, heard
            done, _ = self._game.step(action=self._opponent(heard))
        return True, ""

    @contextmanager
    def _own_dice(self) -> Iterator[None]:
        with _DICE:
            others = random.getstate()
            random.setstate(self._dice)
            try:
                yield
            finally:
                self._dice = random.getstate()
                random.setstate(others)


def _as_text(told: Any, player: int) -> str:
    """What has been said to a player since its last turn, but for its own words."""
    if isinstance(told, str):  # the game's own wrapper has put it together
        return told
    return "\n".join(message.strip() for sender, message, _ in told if sender != player)


def factory(rest: str) -> Callable[[], TextArena]:
    """What makes the game of a name with options.

    Raises:
        WorldError: TextArena has no such game, or cannot make it.
        ImportError: textarena is missing.
    """
    textarena = package(PREFIX)
    check_version(PREFIX, (0, 7))
    name, options = read_options(rest, PREFIX)
    opponent = load_code(options.pop("opponent"), "opponent") if "opponent" in options else None
    known = textarena.envs.registration.ENV_REGISTRY
    if name not in known:
        names = [each for each in known if not each.endswith(("-raw", "-train"))]
        raise WorldError(
            f'environment "{PREFIX}:{rest}": TextArena has no game {name!r}{suggestion(name, names)}; '
            "textarena.pprint_registry_detailed() lists them"
        )
    bare = f"{name}-raw" if f"{name}-raw" in known else name
    wrappers = [each for each in known[name].default_wrappers or [] if issubclass(each, textarena.ActionWrapper)]

    def make() -> Any:
        game = textarena.make(env_id=bare, **options)
        for wrapper in wrappers if bare != name else ():
            game = wrapper(game)
        return game

    _try(make, 1 if opponent is None else 2, rest)
    return type(name, (TextArena,), {"__init__": lambda self: TextArena.__init__(self, make, opponent)})


def _try(make: Callable[[], Any], players: int, rest: str) -> None:
    """Begin one game, to see that it is one for so many players."""
    with _DICE:
        others = random.getstate()
        try:
            make().reset(num_players=players, seed=0)
        except Exception as error:
            told = described(error) if str(error) else f"it is no game for {players}"
            hint = "; a game of two takes an opponent: ?opponent=FILE.py:NAME" if players == 1 else ""
            raise WorldError(f'environment "{PREFIX}:{rest}" cannot be begun: {told}{hint}') from error
        finally:
            random.setstate(others)
