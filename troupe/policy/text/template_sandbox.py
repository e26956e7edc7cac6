"""Where chat templates run: Jinja's immutable sandbox, with bounds on steps and on what is built.

A template is code of others. The sandbox keeps it from reaching out; here it is kept from filling the memory. All that
makes something larger than what it is made of (`*`, `~`, `+`, `%`, filters, methods, blocks that are set, the output)
asks the budget first.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from troupe.policy.text.template_budget import (
    COMPARING,
    MAX_VALUE,
    METHODS,
    OPERATORS,
    REMOVED,
    braces,
    built,
    guarded_filter,
    guarded_test,
    refuse_large,
    spend,
    sum_size,
)


def _sum(items: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    if attribute is not None:
        items = [item[attribute] for item in items]
    total = start
    for item in items:
        spend().build(sum_size(total, item))
        total = total + item
    return total


_JINJAS = ("_loop_vars", "_block_vars")  # arguments that Jinja adds for itself


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, which stops at a forbidden attribute where it is reached for, not where it is later used.

    Calls are steps, because macros and recursive loops that call themselves twice at every level never end either.
    """

    intercepted_binops = frozenset(OPERATORS)

    def __init__(self, extensions: Sequence[str | type[Extension]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_measured)
        self.filters["sum"] = _sum
        for name in REMOVED:
            self.globals.pop(name, None)
            self.filters.pop(name, None)
        for name in COMPARING:
            test: Any = self.tests[name]
            self.tests[name] = guarded_test(test)
        self.concat = _concatenated  # type: ignore[method-assign]

    def guard_filters(self) -> None:
        """Have all filters ask the budget, those that were added, too."""
        for name, function in list(self.filters.items()):
            self.filters[name] = guarded_filter(name, function)
        self.filters |= {_STEPS: _counted, _JOINED: _joined, _BUILT: _built_filter, _MEASURED: _measured}

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 – as in the base
        budget = spend()
        budget.step(1)
        if isinstance(__obj, LoopContext) and args:
            args = (budget.step_over(args[0]), *args[1:])
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, list | tuple | dict) or owner is dict or __obj is dict or __obj is Namespace:
            # these compare what they are given with what they hold, or hash it
            for value in (owner if isinstance(owner, list | tuple) else None, *args):
                budget.measure(value)
        if isinstance(owner, str | bytes | int | float | list | tuple | dict):
            name = __obj.__name__
            refuse_large(name, (*args, *kwargs.values()))
            if name == "join" and args and isinstance(args[0], Iterator):
                args = (list(budget.step_over(args[0])), *args[1:])
            if name in METHODS:
                named = {key: value for key, value in kwargs.items() if key not in _JINJAS}
                budget.build(METHODS[name](owner, *args, **named))
        return built(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        compute, size = OPERATORS[operator]
        spend().build(size(left, right))
        return compute(left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # which is hashed
            spend().measure(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        safe: Callable[..., str] = wrapped

        def format_(*args: Any, **kwargs: Any) -> str:
            spend().build(braces(value.__self__, (*args, *kwargs.values())))
            return safe(*args, **kwargs)

        return format_

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__!r} is forbidden in chat templates")


# --- what is put into the tree of a template ------------------------------------------------------------------------

_STEPS, _JOINED, _BUILT, _MEASURED = "count of steps", "joined text", "built value", "measured value"
"""Names of filters; no identifiers, so that no template can name them."""


def instrument(tree: nodes.Template) -> None:
    """Have loops, `~`, slices, comparisons and keys ask the budget."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _filtered(loop.iter, _STEPS)
    for comparison in list(tree.find_all(nodes.Compare)):
        comparison.expr = _filtered(comparison.expr, _MEASURED)
        for operand in comparison.ops:
            operand.expr = _filtered(operand.expr, _MEASURED)
    for pair in list(tree.find_all(nodes.Pair)):
        pair.key = _filtered(pair.key, _MEASURED)
    _replace_nodes(tree)


def _replace_nodes(node: nodes.Node) -> None:
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            for place, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_nodes(item)
                    value[place] = _replacement(item)
        elif isinstance(value, nodes.Node):
            _replace_nodes(value)
            setattr(node, name, _replacement(value))


def _replacement(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _filtered(node, _BUILT)
    return node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", node), name, [], [], None, None, lineno=node.lineno)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    """What a `for` goes over, counted."""
    return spend().step_over(items)


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    """What `~` gives."""
    return _concatenated(str(_measured(part)) for part in parts)


@pass_context
def _built_filter(context: Context, value: Any) -> Any:
    return built(value)


def _measured(value: Any) -> Any:
    """A value that is to be shown or compared."""
    if type(value) is not str:
        spend().measure(value)
    return value


def _concatenated(parts: Iterable[str]) -> str:
    """`"".join`, as the environment's own: the output, and what macros and blocks give."""
    held, size, budget = [], 0, spend()
    for part in parts:
        held.append(part)
        size += len(part)
        if size > MAX_VALUE:
            break
    budget.build(size)
    return "".join(held)


class GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text; the prompt is the same without the marks."""

    tags = {"generation"}  # noqa: RUF012 – the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
