"""`opdtheory.validate`: one estimator, one pair of models, some prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.estimators import estimator as estimator_named
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.models.samples import Environment
from opdtheory.training.validation.comparison import compare
from opdtheory.training.validation.expectation import Loss
from opdtheory.training.validation.prefixes import Prefixes
from opdtheory.training.validation.report import Validation

__all__ = ["validate"]


def validate(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    estimator: str | Estimator,
    divergence: str | Divergence | None = None,
    *,
    loss: Loss | None = None,
    max_new_tokens: int = 16,
    behavior: LanguageModel | None = None,
    temperature: float = 1.0,
    environment: Environment | None = None,
    parameters: Callable[[str], bool] | None = None,
    draws: int = 256,
    directions: int = 8,
    every_token: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> Validation:
    r"""Compare an estimator's gradient in a language model's parameters with what theory predicts.

    The student answers the prompts. At the prefixes of these answers, four gradients in the student's parameters are
    compared: the exact one of the declared objective, by autograd over the whole vocabulary; the exact one plus the
    bias that theory predicts, $E_p[u f'(u) s]$ for the stop-gradient estimator (T2); the expectation of the
    estimator's own code, summed over every next token; and the mean of the estimator over sampled next tokens.
    Confidence intervals are for projections on fixed random directions, on the exact gradient and on the predicted
    bias. Variances are sums over the vocabulary, because sample variances mislead for heavy-tailed weights.

    Args:
        student: the student; the gradient is in its parameters that require one.
        teacher: the model that scores, with the same vocabulary.
        prompts: texts or token ids; each gets one answer.
        estimator: one of `opdtheory.estimator_names()`, or an `Estimator`, whose weight depends only on the next
            token. For other estimators see `validate_by_enumeration`.
        divergence: the divergence, if `estimator` is a name that needs one.
        loss: function of `Rollouts` to run in place of the estimator, such as a trainer's own code for which the
            estimator states the claim. It sums over tokens and averages over rollouts.
        max_new_tokens: largest length of the answers.
        behavior: the model that samples; by default the student.
        temperature: divides all logits.
        environment: answers calls in the rollouts.
        parameters: selects parameters by name; by default all.
        draws: number of draws of the next token at each prefix.
        directions: number of random directions.
        every_token: run the estimator on every next token, or on those drawn only, see `compare`. By default every
            token, unless the estimator reads whole distributions of more than 4,096 tokens.
        seed: seed of everything random.
        **options: options of `opdtheory.estimator`.

    Raises:
        InvalidArgumentError: the estimator looks beyond the next token, the models do not fit together, or an option
            is wrong.

    Example:
        >>> import opdtheory as opd
        >>> from opdtheory.training import CharacterVocabulary, Transformer, TransformerConfig
        >>> digits = CharacterVocabulary("0123456789+=")
        >>> student, teacher = (Transformer(TransformerConfig(8, 1, 1, 16), digits, seed=s).double() for s in (0, 1))
        >>> found = opd.validate(student, teacher, ["1+2=", "3+4="], "opd", "forward_kl", max_new_tokens=4)
        >>> found.verdict, found.bias > 0.1, abs(found.bias - found.predicted_bias) < 1e-9
        ('agree', True, True)
    """
    if isinstance(estimator, Estimator):
        if divergence is not None or options:
            given = "divergence" if divergence is not None else next(iter(options))
            raise InvalidArgumentError(given, "applies only to an estimator given by name")
        chosen = estimator
    else:
        chosen = estimator_named(estimator, divergence, **options)
    tokens = [student.vocabulary.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    prefixes = Prefixes.sample(
        student,
        teacher,
        tokens,
        max_new_tokens=max_new_tokens,
        behavior=behavior,
        temperature=temperature,
        environment=environment,
        parameters=parameters,
        seed=seed,
    )
    return compare(prefixes, chosen, loss, draws=draws, directions=directions, every_token=every_token, seed=seed)
