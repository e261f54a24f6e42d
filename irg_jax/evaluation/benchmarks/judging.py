"""Asks a judge about images: WISE's marks, TIIF's questions, and which of two images is better.

The wording of the official judges is theirs; the templates here are our own, in the same form. FILE of
--judge_prompt replaces one: what the system message says, a line `---`, what the user asks, with $prompt,
$explanation, $questions and $count where they belong. The digest of the wording is kept with the marks.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from data_pipelines.digests import write_json, write_text
from data_pipelines.endpoints import Declined, Endpoint, EndpointConfig, Reply, encode, in_parallel, said
from data_pipelines.images import read_image
from irg_jax.evaluation.benchmarks import tiif, wise
from irg_jax.evaluation.benchmarks.protocol import Prompt, Protocol

JUDGE, UNANSWERED, ANSWERS = "judge.json", "unanswered.json", "answers.jsonl"
OWN = "irg_jax's own wording"
# Not "A or B". A letter elsewhere in a sentence may be an article, or the other one of two.
_PREFERENCE = re.compile(r"(?m)^[^\w\n]*(?:(?i:better)[^\w\n]*([AB])\b(?![ ,/&]*(?:or |and )?[AB]\b)"
                         r"|([AB])[^\w\n]*$)")
OPTIONS = '{"temperature": 0, "max_tokens": 2000}'


class Template(NamedTuple):
    """What a judge is told; `where` says whose words they are."""

    system: str
    user: string.Template
    where: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.system}\n---\n{self.user.template}".encode()).hexdigest()

    def messages(self, values: Mapping[str, Any], images: Sequence[bytes]) -> list[dict[str, Any]]:
        """A system message, and the question with PNG images."""
        return [said(self.system, role="system"), said(self.user.substitute(values), images=images)]


class Form(NamedTuple):
    """How a benchmark's judge is asked, read and written down."""

    values: Callable[[Prompt], dict[str, Any]]
    parse: Callable[[Prompt, str], Any]
    write: Callable[[pathlib.Path, Sequence[tuple[Prompt, Reply]]], None]


def load_template(name: str, path: str | None = None) -> Template:
    """Our own wording of a form, or that of a file. Raises: ValueError if it is no template of that form."""
    own = pathlib.Path(__file__).parent / "judges" / f"{name}.txt"
    try:
        text = pathlib.Path(path or own).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the judge's prompt cannot be read ({error})") from error
    system, rule, user = text.partition("\n---\n")
    template = string.Template(user.strip())
    known = set(string.Template(own.read_text(encoding="utf-8")).get_identifiers())
    is_valid = template.is_valid()    # else get_identifiers raises
    wrong = sorted((set(template.get_identifiers()) ^ known) - {"count"}) if is_valid else ["$"]
    if not rule or not user.strip() or wrong:
        raise ValueError(f"{path}: needs the system's words, a line ---, and the question with "
                         f"{', '.join(f'${name}' for name in sorted(known))} (see {', '.join(wrong) or '---'})")
    return Template(system.strip(), template, str(path or OWN))


def connect(values: Any, folder: pathlib.Path) -> Endpoint:
    """The judge of the flags; its answers are kept in the folder. Raises: ValueError for a wrong flag."""
    try:
        options = json.loads(values.judge_options)
        price_in, price_out = map(float, values.judge_prices)
        if not isinstance(options, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(f"--judge_options is {values.judge_options!r}, --judge_prices {values.judge_prices}; "
                         f"give a JSON object, and two numbers ({error})") from error
    return Endpoint(EndpointConfig(
        values.judge, values.judge_model or "", key=values.judge_key, options=options,
        concurrency=values.judge_concurrency, price_in=price_in, price_out=price_out,
        budget=values.judge_budget), folder)


def note_usage(endpoint: Endpoint, path: pathlib.Path) -> str:
    """Writes what all answers took, and tells it in a line."""
    usage = endpoint.usage
    write_json(path, {"model": endpoint.config.model, **dataclasses.asdict(usage)})
    cost = f", cost {usage.cost:.4g}" if usage.cost else ""
    return (f"{endpoint.config.model}: {usage.sent} requests sent, {usage.kept} answers kept from before, "
            f"{usage.repeated} sent again, {usage.unparsed} answers not readable; {usage.tokens_in} tokens "
            f"read and {usage.tokens_out} written in all{cost}")


def has_judge(protocol: Protocol) -> bool:
    """Whether the benchmark's judge is one that can be asked here."""
    return name_of(protocol) in FORMS


def judge(protocol: Protocol, prompts: Sequence[Prompt], system: str, *, official: pathlib.Path,
          results: pathlib.Path, endpoint: Endpoint, template: Template) -> None:
    """Asks about every image of a system, and writes its marks as the official script would.

    RESULTS/<system>/judge.json says who was asked and how, unanswered.json which prompts got no mark, since no
    answer parsed or the judge declines to look: they are counted, never guessed. answers.jsonl has all answers.

    Raises: EndpointError, BudgetSpent; the answers so far are kept, and the same call goes on.
    """
    form, folder = FORMS[name_of(protocol)], results / system

    def ask(prompt: Prompt) -> Reply:
        image = (official / protocol.paths(prompt, system)[0]).read_bytes()    # as the official scripts send it
        try:
            return endpoint.ask(template.messages(form.values(prompt), [image]),
                                parse=lambda text: form.parse(prompt, text))
        except Declined as error:
            return Reply(None, (str(error),))

    progress = tqdm(in_parallel(ask, prompts, [endpoint]), f"judge {system}", total=len(prompts), unit="image",
                    disable=None)
    replies = list(zip(prompts, list(progress), strict=True))
    unanswered = [prompt.id for prompt, reply in replies if reply.value is None]
    lines = [json.dumps({"id": prompt.id, "answers": reply.texts}) + "\n" for prompt, reply in replies]
    write_text(folder / ANSWERS, "".join(lines))
    form.write(folder, [(prompt, reply) for prompt, reply in replies if reply.value is not None])
    write_json(folder / UNANSWERED, unanswered)
    write_json(folder / JUDGE, describe(endpoint, template))


def describe(endpoint: Endpoint, template: Template) -> dict[str, Any]:
    """Who was asked, and how."""
    return {"model": endpoint.config.model, "options": endpoint.config.options, "asks": endpoint.config.asks,
            "wording": template.where, "wording_sha256": template.sha256, "system": template.system,
            "question": template.user.template}


def read_preference(text: str) -> str:
    """A or B, of a line "Better: A" or of the letter alone. Raises: ValueError for anything else."""
    found = {first or second for first, second in _PREFERENCE.findall(text)}
    if len(found) != 1:
        raise ValueError(f"neither A nor B alone: {text[:200]!r}")
    return found.pop()


def prefer(pairs: Iterable[tuple[Prompt, pathlib.Path, pathlib.Path]], endpoint: Endpoint, template: Template
           ) -> list[float | None]:
    """How far the second image of each pair is preferred: 1, 0, or 0.5 if the judge prefers a place.

    Each pair is shown in both orders. None where an answer did not parse, or the judge declines to look.
    """
    def ask(pair: tuple[Prompt, pathlib.Path, pathlib.Path]) -> float | None:
        prompt, *paths = pair
        images = [encode(read_image(path)) for path in paths]
        values = {"prompt": prompt.text}
        try:
            replies = [endpoint.ask(template.messages(values, shown), parse=read_preference).value
                       for shown in (images, images[::-1])]
        except Declined:
            return None
        if None in replies:
            return None
        return ((replies[0] == "B") + (replies[1] == "A")) / 2

    pairs = list(pairs)
    return list(tqdm(in_parallel(ask, pairs, [endpoint]), "judge pairs", total=len(pairs), unit="pair",
                     disable=None))


def name_of(protocol: Protocol) -> str:
    """The form's name, and its template's."""
    return f"wise_{protocol.version}" if protocol.name == "wise" else protocol.name


def _explained(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": prompt.text, "explanation": prompt.details["Explanation"]}


def _asked(prompt: Prompt) -> dict[str, Any]:
    questions = prompt.details["questions"]
    return {"questions": "\n".join(questions), "count": len(questions)}


def _write_marks(folder: pathlib.Path, replies: Sequence[tuple[Prompt, Reply]]) -> None:
    lines = [json.dumps({"prompt_id": int(prompt.id), "Subcategory": prompt.details.get("Subcategory", ""),
                         **reply.value}) + "\n" for prompt, reply in replies]
    write_text(folder / wise.SCORES, "".join(lines))


def _write_answers(folder: pathlib.Path, replies: Sequence[tuple[Prompt, Reply]]) -> None:
    for prompt, reply in replies:
        details = prompt.details
        write_json(folder / tiif.result_path(prompt), {
            "attribute": prompt.category, "desc": f"{details['length']}_description",
            "line_idx": details["index"], "questions": details["questions"], "gt_answers": details["answers"],
            "model_pred": reply.value, "model_output": reply.texts[-1]})


FORMS = {
    "wise_legacy": Form(_explained, lambda _, text: wise.read_legacy_answer(text), _write_marks),
    "wise_verified": Form(_explained, lambda _, text: wise.read_verified_answer(text), _write_marks),
    "tiif": Form(_asked, lambda prompt, text: tiif.read_answers(text, len(prompt.details["questions"])),
                 _write_answers),
}
