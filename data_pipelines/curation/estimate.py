"""What a curation will ask and cost, told before anything is sent.

It is what an empty folder of answers and well-behaved models cost: requests that are already answered are known
only as they come up, and cost nothing; what must be asked again, or fails a filter on the way, is not foreseen.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data_pipelines.curation.config import CurateConfig
from data_pipelines.curation.gathering import Crew, Plan
from data_pipelines.curation.material import Case
from data_pipelines.curation.templates import Templates
from data_pipelines.endpoints import EndpointConfig


class Expense(NamedTuple):
    """Requests of one kind, and what they come to."""

    what: str
    model: str
    requests: int
    tokens_in: int = 0
    tokens_out: int = 0
    images: int = 0        # drawn
    cost: float = 0.0      # in the currency of the prices


def estimate(cases: Sequence[Case], *, config: CurateConfig, templates: Templates, crew: Crew,
             plan: Plan) -> list[Expense]:
    """One entry for each kind of request that goes to an endpoint, in the order of the work."""
    assumed, sketcher, painter = config.estimate, config.sketcher, config.painter
    sides = {case.id: plan.sides(case, crew) for case in cases}
    improves = {id_ for case in cases if "improving" in sides[id_ := case.id] and crew.sketcher.has(case)}
    improved = [case for case in cases if case.id in improves]
    initial = [case for case in cases if "initial" in sides[case.id]]
    told = [case for case in cases if case.id in improves or "initial" in sides[case.id]]
    found = []

    def add(what: str, endpoint: EndpointConfig, of: Sequence[Case], texts: Iterable[str], *, shown: int = 0,
            tokens_out: int = 0, is_drawn: bool = False) -> None:
        count = len(of)
        read = round(sum(map(len, texts)) / assumed.chars_per_token) + count * shown * assumed.image_tokens
        wrote, images = count * tokens_out, count * is_drawn
        cost = endpoint.cost(tokens_in=read, tokens_out=wrote, images=images)
        found.append(Expense(what, endpoint.model, count, read, wrote, images, cost))

    prompts = lambda of: (case.prompt for case in of)
    fill = lambda template, of: (template.substitute(prompt=prompt) for prompt in prompts(of))
    if sketcher.kind == "endpoint" and improved:
        if sketcher.writer:
            add("first thoughts", sketcher.writer, improved,
                (templates.words.system_prompt + prompt for prompt in prompts(improved)),
                tokens_out=assumed.thought_tokens)
        add("first images", sketcher.painter, improved, prompts(improved), is_drawn=True)
    if painter.kind == "endpoint":
        drawn = [case for case in told if case.image is None]
        add("better images", painter.endpoint, drawn, fill(templates.paint, drawn), is_drawn=True)
    if config.critic.kind == "endpoint":
        critic = config.critic.endpoint
        if config.filters.min_quality > 0:
            add("scores", critic, told, fill(templates.quality, told), shown=1, tokens_out=assumed.score_tokens)
        add("thoughts", critic, initial, fill(templates.think, initial), shown=1,
            tokens_out=assumed.thought_tokens)
        thought = "x" * round(assumed.thought_tokens * assumed.chars_per_token)
        add("reflections", critic, improved,
            (templates.ask_reflection(prompt=prompt, first_thought=thought) for prompt in prompts(improved)),
            shown=2, tokens_out=assumed.reflection_tokens)
    return [expense for expense in found if expense.requests]


def describe(expenses: Sequence[Expense]) -> str:
    """A table for people."""
    if not expenses:
        return "estimate: no endpoint is asked"
    lines = ["estimate, if nothing is answered yet and every answer will do (kept answers cost nothing, but "
             "are known only as they come up):",
             f"{'':16}{'requests':>9}{'tokens in':>14}{'tokens out':>12}{'images':>9}{'cost':>11}  model"]
    total = Expense("in all", "", *map(sum, zip(*(expense[2:] for expense in expenses))))
    lines += [f"{one.what:16}{one.requests:9,}{one.tokens_in:14,}{one.tokens_out:12,}{one.images:9,}"
              f"{one.cost:11,.2f}  {one.model}" for one in (*expenses, total)]
    return "\n".join(line.rstrip() for line in lines)
