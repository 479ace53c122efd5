"""How to call a function that does not take rollouts alone, read from the names of its parameters and tried out."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from opdtheory.testing.calls import called

__all__ = ["Suggestion", "signature_of", "suggestion", "takes_rollouts_alone"]

_DOTS = "..."

# Words of a parameter's name, and what they stand for.
_SAMPLER = {"old", "behavior", "behaviour", "sampler", "sampling", "rollout", "inference", "mu", "prev", "previous"}
_TEACHER = {"teacher", "ref", "reference", "target", "expert", "q", "t"}
_STUDENT = {"student", "policy", "actor", "model", "new", "current", "cur", "p", "pi", "s"}
_LOGITS = {"logits", "logit"}
_LOGPROBS = {"logprob", "logprobs", "logp", "logps", "logq", "logpi"}
_AFTER_LOG = {"prob", "probs", "probability", "probabilities", "p", "q", "ps", "pi", "mu", "likelihood", "likelihoods"}
_PROBS = {"prob", "probs", "probability", "probabilities"}
_LABELS = {"label", "labels"}
_TOKENS = {"ids", "id", "token", "tokens", "action", "actions", "responses", "completions", "sequences"}
_INDICES = {"indices", "index", "idx", "ids", "id", "tokens"}
_REWARDS = {"advantage", "advantages", "adv", "reward", "rewards", "returns"}
_ROLLOUTS = {"r", "rollout", "rollouts", "batch"}
_HIDDEN = {"hidden", "hiddens", "states", "input", "inputs"}
_HEADS = {"head", "heads", "weight", "weights"}

_FAILED = ", though this failed when it was tried"

# Parameters that are named after nothing but who they belong to hold logits or log-probabilities.
_FIELDS = ("logprobs", "logits")

# What makes a scalar of a result of this shape on the batch that calls are tried on, the best sign of a right call
# first: one value per token, a scalar, one value per entry, one value per rollout.
_REDUCTIONS = {(2, 3): "r.token_sum({})", (): "{}", (2, 3, 4): "r.token_sum({}.sum(-1))", (2,): "{}.mean()"}


@dataclass(frozen=True)
class Suggestion:
    """How a function may be called.

    Attributes:
        words: what the function is and which adapter serves it, in a clause.
        call: an expression of `f` and `r`; dots stand for what only the caller knows.
    """

    words: str
    call: str


@dataclass(frozen=True)
class _Callee:
    """What is called, as an expression of `f`, and the parameters that remain."""

    text: str
    parameters: list[inspect.Parameter]
    words: str = "say how to call it"


def takes_rollouts_alone(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with one argument, as far as its signature tells."""
    if isinstance(function, type):
        return False
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:
        pass  # a builtin without a signature
    return True


def signature_of(function: Callable[..., Any]) -> str:
    """A function's name with its parameters, as in its definition."""
    name = getattr(function, "__name__", type(function).__name__)
    parameters = _parameters(function)
    return f"{name}(...)" if parameters is None else f"{name}({', '.join(each.name for each in parameters)})"


def suggestion(function: Callable[..., Any]) -> Suggestion | None:
    """How to call a function, or None if nothing is known of its parameters.

    Candidates are tried on a small random batch, and the first that gives a scalar or one value per token is returned.
    """
    callee = _callee(function)
    if callee is None or not callee.parameters:
        return None
    adapted = _adapted(callee)
    if adapted is not None:
        fails = _DOTS not in adapted.call and _shape(function, adapted.call) is None
        return replace(adapted, words=f"{adapted.words}{_FAILED}") if fails else adapted
    candidates = [_plain(callee, field) for field in _order_of_fields(callee)]
    if "r" not in re.findall(r"\b\w+", candidates[0]) and _DOTS not in candidates[0]:
        return None
    tried = [(_shape(function, each), each) for each in candidates if _DOTS not in each]
    reduced = ((_REDUCTIONS[shape].format(each)) for shape in _REDUCTIONS for found, each in tried if found == shape)
    call = next(reduced, None)
    failed = _FAILED if call is None and tried else ""
    call = call or f"r.token_sum({candidates[0]})"
    filled = ", with your values in place of the dots" if _DOTS in call else ""
    return Suggestion(f"{callee.words}{filled}{failed}", call)


def _callee(function: Callable[..., Any]) -> _Callee | None:
    if isinstance(function, type):
        return _instance(function)
    # A module of torch has the signature of its forward method.
    inner = getattr(function, "forward", None)
    parameters = _parameters(inner if callable(inner) else function)
    if parameters is None:
        return None
    if parameters and parameters[0].name in ("self", "cls"):
        read = "".join(f", {name}={_DOTS}" for name in _attributes(function, parameters[0].name))
        return _Callee(
            f"opdtheory.bind(f{read})",
            parameters[1:],
            "it is a method, which opdtheory.bind calls without an instance",
        )
    return _Callee("f", parameters)


def _instance(kind: type) -> _Callee | None:
    method = getattr(kind, "forward", None) or vars(kind).get("__call__")
    parameters = _parameters(method) if callable(method) else None
    made = _parameters(kind)
    if parameters is None or made is None:
        return None
    needed = ", ".join(f"{each.name}={_DOTS}" for each in made if _required(each))
    return _Callee(f"f({needed})", parameters[1:], "it is a class; call an instance")


def _parameters(function: Any) -> list[inspect.Parameter] | None:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [each for each in found if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _attributes(method: Callable[..., Any], own: str) -> list[str]:
    """The attributes that a method reads from its instance, if its source is at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return []
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    return sorted({node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == own})


def _words(name: str) -> list[str]:
    """The words of a name in lower case, of `snake_case` and `camelCase` alike."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _is_log(words: list[str]) -> bool:
    return bool(_LOGPROBS & set(words)) or any(
        a == "log" and b in _AFTER_LOG for a, b in zip(words[:-1], words[1:], strict=True)
    )


def _is_top_k(words: list[str]) -> bool:
    return "topk" in words or ("top" in words and "k" in words)


def _owner(words: list[str]) -> str | None:
    """Whose logits or log-probabilities a name speaks of."""
    for owner, signs in (("behavior", _SAMPLER), ("teacher", _TEACHER), ("student", _STUDENT)):
        if signs & set(words) or (owner == "teacher" and "logq" in words):
            return owner
    return None


def _argument(name: str, field: str) -> str | None:
    """The expression of `r` that a parameter of this name takes, or None; `field` decides where the name does not."""
    words = _words(name)
    known, owner = set(words), _owner(words)
    if name in _ROLLOUTS:
        return "r"
    if known & (_HEADS | {"hidden", "hiddens"}):
        return None
    if known & {"mask", "masks"}:
        return "r.mask == 0" if known & {"pad", "padding"} else "r.mask"
    if known & {"length", "lengths", "lens"}:
        return "r.mask.sum(-1)"
    if known & _LOGITS:
        return None if owner == "behavior" else f"r.{owner or 'student'}_logits"
    if _is_log(words):
        return _log_probabilities(owner or "student", field)
    if known & _PROBS:
        whole = _log_probabilities(owner or "student", field)
        return None if whole is None else f"{whole}.exp()"
    if known & _LABELS or known == {"targets"}:
        return "r.labels"
    if words in (["log", "u"], ["u"]):
        return "r.log_u" if len(words) == 2 else "r.log_u.exp()"
    if known & _REWARDS:
        return "r.log_u.detach()"
    if words in (["p"], ["q"]):
        return f"r.{owner}_logits.softmax(-1)" if field == "logits" else f"r.{owner}_logprobs.exp()"
    if owner is not None:
        if field == "logits":
            return None if owner == "behavior" else f"r.{owner}_logits"
        return f"r.{owner}_logprobs"
    return "r.tokens" if known & _TOKENS else None


def _log_probabilities(owner: str, field: str) -> str | None:
    if field == "logprobs":
        return f"r.{owner}_logprobs"
    return None if owner == "behavior" else f"r.{owner}_logits.log_softmax(-1)"


def _order_of_fields(callee: _Callee) -> tuple[str, ...]:
    """What names that say only whose they are stand for, the likelier first."""
    named = {word for each in callee.parameters for word in _words(each.name)}
    return _FIELDS[::-1] if named & (_LOGITS | _LABELS) else _FIELDS


def _plain(callee: _Callee, field: str) -> str:
    """The call with each parameter that is known or needed."""
    arguments: list[str] = []
    positional = True
    for each in callee.parameters:
        value = _argument(each.name, field)
        if not _required(each) and (value is None or each.default is not None):
            positional = False
            continue
        positional = positional and each.kind is not each.KEYWORD_ONLY
        shown = value or _DOTS
        arguments.append(shown if positional and value is not None else f"{each.name}={shown}")
        positional = positional and value is not None
    return f"{callee.text}({', '.join(arguments)})"


def _adapted(callee: _Callee) -> Suggestion | None:
    """The adapter for the teacher's likeliest tokens, hidden states, or logits with labels, if one fits."""
    words = {each.name: _words(each.name) for each in callee.parameters}
    if any(_is_top_k(each) or {"indices", "idx"} & set(each) for each in words.values()):
        roles = {name: _top_k_role(each) for name, each in words.items()}
        adapter = f"opdtheory.from_top_k({callee.text}, 2"
        given: tuple[str, ...] = ("student_logits", "ids", "logprobs", "labels")
        told = "opdtheory.from_top_k passes the teacher's likeliest tokens, here 2"
    elif any(_HEADS & set(each) for each in words.values()):
        roles = {name: _hidden_role(each) for name, each in words.items()}
        adapter = f"opdtheory.from_hidden({callee.text}"
        given = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels")
        told = "opdtheory.from_hidden passes hidden states and heads (add flat=True if the function takes rows)"
    elif any(_LABELS & set(each) for each in words.values()):
        roles = {name: _logits_role(each) for name, each in words.items()}
        adapter, given = f"opdtheory.from_logits({callee.text}", ("student_logits", "teacher_logits", "labels")
        told = "opdtheory.from_logits passes logits and labels (add shifted=True if the function shifts them itself)"
    else:
        return None
    taken = [each for each in callee.parameters if _required(each) or (each.default is None and roles[each.name])]
    order = [roles[each.name] for each in taken]
    if None in order or len(set(order)) < len(order) or order == ["labels"]:
        return None
    names = {roles[each.name]: each.name for each in taken}
    in_order = order == list(given) and all(each.kind is not each.KEYWORD_ONLY for each in taken)
    quoted = ", ".join(f'"{names[each]}"' if each in names else "None" for each in given)
    keywords = "" if in_order else f", names=({quoted})"
    filled = ", with your values in place of the dots" if _DOTS in callee.text else ""
    start = f"{callee.words}; " if callee.text != "f" else ""
    return Suggestion(f"{start}{told}{filled}", f"{adapter}{keywords})(r)")


def _logits_role(words: list[str]) -> str | None:
    known = set(words)
    if known & _LABELS:
        return "labels"
    owner = _owner(words)
    if known & {"mask", "masks"} or _is_log(words) or owner == "behavior" or not (owner or known & _LOGITS):
        return None
    return f"{owner or 'student'}_logits"


def _hidden_role(words: list[str]) -> str | None:
    known = set(words)
    if known & _LABELS:
        return "labels"
    part = "head" if known & _HEADS else "hidden" if known & _HIDDEN else None
    return None if part is None or _owner(words) == "behavior" else f"{_owner(words) or 'student'}_{part}"


def _top_k_role(words: list[str]) -> str | None:
    known = set(words)
    if known & _LABELS:
        return "labels"
    if known & _INDICES:
        return "ids"
    if _owner(words) == "student" or (known & _LOGITS and not known & _TEACHER and not _is_top_k(words)):
        return "student_logits"
    return "logprobs" if _is_log(words) or known & (_TEACHER | {"values"}) or _is_top_k(words) else None


def _shape(function: Callable[..., Any], call: str) -> tuple[int, ...] | None:
    """The shape of a call's result on a small batch, or None if it fails or has no gradient."""
    with _silently():
        try:
            value = called(function, call)(_batch())
            return tuple(value.shape) if value.requires_grad else None
        except KeyboardInterrupt:
            raise
        # Whatever a function does that was called on a guess, only the guess is wrong.
        except BaseException:
            return None


def _batch() -> Any:
    """Two random rollouts of three tokens from a vocabulary of four, one of them shorter."""
    import torch

    from opdtheory.rollouts import Rollouts

    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 2], [3, 0, 0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    return Rollouts.from_logits(tokens, student.requires_grad_(), teacher, mask)


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """Without output and without warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield
