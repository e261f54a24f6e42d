"""From the configuration to whoever does the work."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from data_pipelines.curation.config import CurateConfig
from data_pipelines.curation.critics import Critic, EndpointCritic, FolderCritic
from data_pipelines.curation.filters import Rules, load_safety
from data_pipelines.curation.gathering import Crew, Plan
from data_pipelines.curation.painters import EndpointPainter, FolderPainter, Painter
from data_pipelines.curation.sketchers import EndpointSketcher, FolderSketcher, Sketcher
from data_pipelines.curation.templates import Templates, load_templates
from data_pipelines.endpoints import Endpoint, EndpointConfig
from data_pipelines.shapes.crew import HEADINGS, WORDS, ShapesCrew

# How an endpoint is asked, not what it answers; and where things lie, whose digests are recorded by themselves.
_MANNERS = ("url", "key", "concurrency", "timeout", "attempts", "price_in", "price_out", "price_image",
            "budget")
_PLACES = ("prompts", "templates", "folder", "estimate")


Connect = Callable[[str, EndpointConfig], Endpoint]    # by what it does, and how


class Opened(NamedTuple):
    """All that a curation works with."""

    crew: Crew
    plan: Plan
    templates: Templates
    endpoints: Mapping[str, Endpoint]      # by what they do


def open_crew(config: CurateConfig, answers: pathlib.Path) -> Opened:
    """Args: answers, the folder that keeps what endpoints say, one folder for each.

    Raises: ValueError naming the template, folder, hook or key that is missing or wrong.
    """
    templates = load_templates(config.templates)
    if config.critic.kind == "shapes":
        templates = templates._replace(words=WORDS, headings=HEADINGS)
    rules = Rules(config.filters, templates.headings, load_safety(config.safety))
    endpoints: dict[str, Endpoint] = {}

    def connect(name: str, endpoint: EndpointConfig) -> Endpoint:
        return endpoints.setdefault(name, Endpoint(endpoint, answers / name))

    crew = Crew(_open_critic(config, templates, rules, connect), _open_painter(config, templates, connect),
                _open_sketcher(config, templates, connect))
    plan = Plan(config.modes, templates.words, rules, config.improve_pairs)
    return Opened(crew, plan, templates, endpoints)


def describe_config(config: CurateConfig) -> dict[str, Any]:
    """The fields that decide the records: not where things lie, what they cost, or how patiently one asks."""

    def describe(value: Any) -> Any:
        if isinstance(value, EndpointConfig):
            return {name: field for name, field in dataclasses.asdict(value).items() if name not in _MANNERS}
        if dataclasses.is_dataclass(value):
            return {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)
                    if field.name not in _PLACES}
        return value

    return json.loads(json.dumps(describe(config)))    # as a manifest gives it back: options may hold tuples


def _open_critic(config: CurateConfig, templates: Templates, rules: Rules, connect: Connect) -> Critic:
    match config.critic.kind:
        case "endpoint":
            return EndpointCritic(connect("critic", config.critic.endpoint), templates, rules,
                                  max_side=config.critic.max_side)
        case "folder":
            return FolderCritic(config.critic.folder, templates.headings)
    return ShapesCrew(config.painter.side)


def _open_painter(config: CurateConfig, templates: Templates, connect: Connect) -> Painter | None:
    match config.painter.kind:
        case "endpoint":
            return EndpointPainter(connect("painter", config.painter.endpoint), templates,
                                   size=config.painter.size)
        case "folder":
            return FolderPainter(config.painter.folder)
        case "shapes":
            return ShapesCrew(config.painter.side)
    return None


def _open_sketcher(config: CurateConfig, templates: Templates, connect: Connect) -> Sketcher | None:
    match config.sketcher.kind:
        case "endpoint":
            writer = config.sketcher.writer and connect("first_thoughts", config.sketcher.writer)
            return EndpointSketcher(writer, connect("first_images", config.sketcher.painter),
                                    size=config.sketcher.size, system_prompt=templates.words.system_prompt)
        case "folder":
            return FolderSketcher(config.sketcher.folder)
    return None
