"""The arguments of one call of a flow, from what the user wrote to what its function gets."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import conclusion, parameters, refs, skipping, values
from penstock.engine.annotations import Annotation, allow_failure, allow_skipped, freeze, quote
from penstock.engine.caller import wait_sources
from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.futures import run_of
from penstock.engine.graph import admits
from penstock.engine.states import StateType
from penstock.engine.steps import Steps, Wait
from penstock.settings import settings

if TYPE_CHECKING:
    from penstock.engine.flow import Flow


class FlowArguments:
    """Binds arguments, brings futures among them to the form that each parameter asks for, and validates.

    Parameters
    ----------
    flow : Flow
        What is called.
    args, kwargs
        As the user wrote them; afterwards as the function gets them.
    """

    def __init__(self, flow: Flow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.flow = flow
        self.args = args
        self.kwargs = kwargs
        self.named: dict[str, Any] = {}
        self._validated = False

    def bind(self) -> None:
        """Find out which parameter each one is for."""
        self.named = parameters.bind(self.flow.signature, self.flow.name, self.args, self.kwargs)

    def bound(self) -> dict[str, Any] | None:
        """Return them by name, None if they do not fit; whoever says so comes later."""
        try:
            return parameters.bind(self.flow.signature, self.flow.name, self.args, self.kwargs)
        except Exception:
            return None

    def are_fit(self) -> bool:
        """Coerce the parameters before the run is named after them; with futures among them that is too early."""
        if self.flow.options.validate_parameters and not self.futures():
            try:
                self.named = parameters.validate(self.flow.fn, self.flow.signature, self.named)
            except errors.ParameterTypeError:
                return False  # said when the run begins
            self._validated = True
        return True

    def futures(self) -> list[TaskRun]:
        """Return the runs of the futures among them."""
        return conclusion.members_of([*self.args, *self.kwargs.values()]).runs

    def steps(self, wait_for: Any, run: FlowRun) -> Steps:
        """Bring futures among the arguments to the form that each parameter asks for, and validate."""
        hints = parameters.type_hints(self.flow.fn) if self.futures() else {}
        sources = [source for source in wait_sources(wait_for) if source.run is not None]
        yield Wait([source.run for source in sources if source.run is not None])
        for source in sources:
            self._check(source.run, source.tolerant, run)
        for name, value in list(self.named.items()):
            hint = hints.get(name)
            marked = isinstance(value, (allow_failure, allow_skipped))
            plain = value.unwrap() if isinstance(value, Annotation) else value
            runs = [] if isinstance(value, (quote, freeze)) else self._wanted(plain, hint, marked)
            yield Wait(runs)
            self.named[name] = self._resolved(value, runs, run) if runs else plain
        if self.flow.options.validate_parameters and not self._validated:
            try:
                self.named = parameters.validate(self.flow.fn, self.flow.signature, self.named)
            except errors.ParameterTypeError as error:
                message = f"Validation of flow parameters failed with error: {error}"
                raise errors.ParameterTypeError(message) from None
        self.args, self.kwargs = parameters.unbind(self.flow.signature, self.named)
        run.parameters = dict(self.named)

    @staticmethod
    def _wanted(value: Any, hint: Any, marked: bool) -> list[TaskRun]:
        """Return the runs whose values a parameter asks for; the others go in as references."""
        if parameters.takes_reference(hint) and not marked:
            return []
        return conclusion.members_of(value).runs

    def _resolved(self, value: Any, runs: list[TaskRun], flow_run: FlowRun) -> Any:
        """Put values in the place of futures; what an annotation tolerates has something else there."""
        size = sum(run.nbytes for run in runs if run.completed)
        if size > settings().large_argument:
            warnings.warn(
                f"flow {self.flow.name!r} asks by an annotation for values of {size:,} bytes, which come to "
                "this process; annotate the parameter PenstockFuture[...] to pass a reference.",
                stacklevel=8,
            )
        completed = [run for run in runs if run.completed]
        found = dict(zip(completed, values.results(completed), strict=True))

        def leaf(item: Any, tolerant: int) -> Any:
            run = run_of(item)
            if run is None or run not in runs:
                return item
            self._check(run, tolerant, flow_run)
            return found[run] if run in found else values.stand_in(run, tolerant)

        return refs.replace(value, leaf)

    @staticmethod
    def _check(run: TaskRun | None, tolerant: int, flow_run: FlowRun) -> None:
        """Raise what an upstream that has ended without a value means for this run."""
        if run is None or admits(run, tolerant):
            return
        if run.type is StateType.SKIPPED:
            raise skipping.passed_on(run)
        message = f"Upstream task run '{run.id}' did not reach a 'COMPLETED' state."
        raise errors.UnfinishedRun(message).of_run(flow_run.id) from values.exception_of(run)
