"""TRL's GKD trainer, sound and with one fault at a time, and what the audit must say of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdtheory.end_to_end import TrainerPair

__all__ = ["FAULTS", "REFUSED", "gkd", "masks_by_token", "sound"]


def gkd(pair: TrainerPair, kind: type | None = None, **settings: Any) -> Any:
    """The trainer, of another class if one is given."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    chosen = {"lmbda": 1.0, "beta": 1.0, "temperature": 1.0, "max_new_tokens": pair.horizon, **settings}
    return (kind or GKDTrainer)(
        model=pair.student,
        teacher_model=pair.teacher,
        args=GKDConfig(**pair.arguments, **chosen),
        train_dataset=pair.dataset,
        processing_class=pair.tokenizer,
    )


def sound(pair: TrainerPair) -> Any:
    """As TRL ships it, at temperature 1."""
    return gkd(pair)


def _labels(change: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
    """The trainer with other tokens, attention mask or labels after generation."""

    def build(pair: TrainerPair) -> Any:
        from trl.experimental.gkd import GKDTrainer

        class Faulty(GKDTrainer):
            @staticmethod
            def generate_on_policy_outputs(model: Any, inputs: Any, generation_config: Any) -> Any:
                found = GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
                return change(*found, inputs["prompts"].shape[1])

        return gkd(pair, Faulty)

    return build


def _loss(compute: Callable[[Any, Any, Any, Any], Tensor]) -> Callable[..., Any]:
    """The trainer with another loss."""

    def build(pair: TrainerPair) -> Any:
        from trl.experimental.gkd import GKDTrainer

        class Faulty(GKDTrainer):
            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
            ) -> Any:
                return compute(self, model, inputs, num_items_in_batch)

        return gkd(pair, Faulty)

    return build


def _models(self: Any, model: Any, inputs: Any, student_mask: bool = True, teacher_mask: bool = True) -> Any:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ours = model(input_ids=ids, attention_mask=mask if student_mask else torch.ones_like(mask)).logits
    with torch.no_grad():
        theirs = self.teacher_model(
            input_ids=ids, attention_mask=mask if teacher_mask else torch.ones_like(mask)
        ).logits
    return ours, theirs, inputs["labels"]


def _summed(self: Any, ours: Tensor, theirs: Tensor, labels: Tensor, number: Any, **options: Any) -> Tensor:
    loss: Tensor = self.generalized_jsd_loss(
        ours, theirs, labels=labels, beta=self.beta, num_items_in_batch=number, **options
    )
    return loss


def _shifted(self: Any, model: Any, inputs: Any, number: Any, ours_at: int = 0, theirs_at: int = 0) -> Tensor:
    """Logits read `ours_at` and `theirs_at` tokens late."""
    ours, theirs, labels = _models(self, model, inputs)
    ours, theirs = (torch.roll(x, -late, 1) for x, late in ((ours, ours_at), (theirs, theirs_at)))
    return _summed(self, ours[:, :-1], theirs[:, :-1], labels[:, 1:], number)


def _masks(student: bool, teacher: bool) -> Callable[..., Tensor]:
    def compute(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
        ours, theirs, labels = _models(self, model, inputs, student, teacher)
        return _summed(self, ours[:, :-1], theirs[:, :-1], labels[:, 1:], number)

    return compute


def _tempered(ours_at: float, theirs_at: float) -> Callable[..., Tensor]:
    def compute(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
        ours, theirs, labels = _models(self, model, inputs)
        return _summed(self, ours[:, :-1] / ours_at, theirs[:, :-1] / theirs_at, labels[:, 1:], number)

    return compute


def _by_token(self: Any, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """The divergence of each position, and which count."""
    ours, theirs, labels = _models(self, model, inputs)
    values = self.generalized_jsd_loss(ours[:, :-1], theirs[:, :-1], beta=self.beta, reduction="none").sum(-1)
    return values, (labels[:, 1:] != -100).to(values.dtype)


def _own_means(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
    values, mask = _by_token(self, model, inputs)
    return ((values * mask).sum(1) / mask.sum(1)).mean() / self.args.gradient_accumulation_steps


def _padded_means(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
    values, mask = _by_token(self, model, inputs)
    longest = int(mask.sum(1).max())
    return ((values * mask).sum(1) / longest).mean() / self.args.gradient_accumulation_steps


def _micro_batch_means(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
    values, mask = _by_token(self, model, inputs)
    return (values * mask).sum() / mask.sum() / self.args.gradient_accumulation_steps


def _with_prompt_means(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
    values, mask = _by_token(self, model, inputs)
    return (values * mask).sum() / inputs["attention_mask"].sum() / self.args.gradient_accumulation_steps


def _uphill(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
    return -_masks(True, True)(self, model, inputs, number)


def _detached_reward(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
    ours, theirs, labels = _models(self, model, inputs)
    log_p, log_q = (x[:, :-1].log_softmax(-1) for x in (ours, theirs))
    log_u, mask = (log_q - log_p).detach(), labels[:, 1:] != -100
    paid = (log_p.exp() * log_u.exp() * log_u).sum(-1)  # the forward KL as a reward
    del paid
    rows = -(log_p.exp() * (-log_u.exp() * log_u)).sum(-1)
    return rows[mask].sum() / number


def _leak_prompt(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    return ids, mask, torch.where(mask > 0, ids, -100)


def _one_early(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    changed = labels.clone()
    changed[:, prompt - 1] = ids[:, prompt - 1]
    return ids, mask, changed


def _ends(ids: Tensor, prompt: int) -> Tensor:
    """Where the end of a sequence was written, `<eos>` being token 1, or 0 where it is the padding too."""
    found = ids == 1
    found[:, :prompt] = False
    return found


def _drop_end(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    return ids, mask, labels.masked_fill(_ends(ids, prompt), -100)


def _keep_padding(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    changed = ids.clone()
    changed[:, :prompt] = -100
    return ids, mask, changed


def _drop_first(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    changed = labels.clone()
    changed[:, prompt] = -100
    return ids, mask, changed


def _drop_last(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    changed, last = labels.clone(), (labels != -100).long().cumsum(1).argmax(1)
    changed[torch.arange(len(ids)), last] = -100
    return ids, mask, changed


def _drop_unended(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    ended = _ends(ids, prompt).any(1, keepdim=True)
    return ids, mask, torch.where(ended, labels, -100)


def _all_ones(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    return ids, torch.ones_like(mask), labels


def _sampling(**options: Any) -> Callable[..., Any]:
    def build(pair: TrainerPair) -> Any:
        trainer = gkd(pair)
        for name, value in options.items():
            setattr(trainer.generation_config, name, value)
        return trainer

    return build


def _eval_mode(pair: TrainerPair) -> Any:
    from trl.experimental.gkd import GKDTrainer

    class Faulty(GKDTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            model.eval()
            return super().compute_loss(model, *args, **kwargs)

    return gkd(pair, Faulty)


def _teacher_learns(pair: TrainerPair) -> Any:
    def compute(self: Any, model: Any, inputs: Any, number: Any) -> Tensor:
        self.teacher_model.train()
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        ours, theirs = (each(input_ids=ids, attention_mask=mask).logits for each in (model, self.teacher_model))
        return _summed(self, ours[:, :-1], theirs[:, :-1], labels[:, 1:], number)

    return _loss(compute)(pair)


def _prompts_cut(pair: TrainerPair) -> Any:
    from trl.experimental.gkd import GKDTrainer

    class Faulty(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            inputs["prompts"], inputs["prompt_attention_mask"] = (
                inputs[name][:, -1:] for name in ("prompts", "prompt_attention_mask")
            )
            return super().training_step(model, inputs, *args)

    return gkd(pair, Faulty)


def _prompts_doubled(pair: TrainerPair) -> Any:
    from trl.experimental.gkd import GKDTrainer

    class Faulty(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            for name in ("prompts", "prompt_attention_mask"):
                inputs[name] = torch.cat([inputs[name], inputs[name][:, -1:]], 1)
            return super().training_step(model, inputs, *args)

    return gkd(pair, Faulty)


def _generated_without_mask(pair: TrainerPair) -> Any:
    from trl.experimental.gkd import GKDTrainer

    class Faulty(GKDTrainer):
        @staticmethod
        def generate_on_policy_outputs(model: Any, inputs: Any, generation_config: Any) -> Any:
            changed = {**inputs, "prompt_attention_mask": torch.ones_like(inputs["prompt_attention_mask"])}
            ids, mask, labels = GKDTrainer.generate_on_policy_outputs(model, changed, generation_config)
            prompt = inputs["prompts"].shape[1]
            mask[:, :prompt] = inputs["prompt_attention_mask"]
            return ids, mask, labels

    return gkd(pair, Faulty)


def _never_cleared(pair: TrainerPair) -> Any:
    from trl.experimental.gkd import GKDTrainer

    class Faulty(GKDTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            made = super().create_optimizer(*args, **kwargs)
            made.zero_grad = lambda *args, **kwargs: None
            return made

        def training_step(self, model: Any, *args: Any) -> Any:
            model.zero_grad = lambda *args, **kwargs: None
            return super().training_step(model, *args)

    return gkd(pair, Faulty)


def _learns_anyway(pair: TrainerPair) -> Any:
    from trl.experimental.gkd import GKDTrainer

    class Faulty(GKDTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.args.learning_rate = 0.1
            return super().create_optimizer(*args, **kwargs)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer or self.optimizer, 1.0)
            return self.lr_scheduler

    return gkd(pair, Faulty)


def _wrong_student(pair: TrainerPair) -> Any:
    import dataclasses

    from opdtheory.end_to_end import trainer_pair

    return gkd(dataclasses.replace(pair, student=trainer_pair(pair.prompts, pair.horizon, seed=5).student))


def _other_batch(pair: TrainerPair) -> Any:
    import dataclasses

    return gkd(dataclasses.replace(pair, batch_size=1))


# What must be found in the words of the report.
FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "no shift": (_loss(lambda s, m, i, n: _shifted(s, m, i, n, 1, 1)), "off by one"),
    "prompt in the loss": (_labels(_leak_prompt), "reads the prompt"),
    "labels one token early": (_labels(_one_early), "labels start one token early"),
    "end dropped": (_labels(_drop_end), "nothing teaches when to stop"),
    "padding in the loss": (_labels(_keep_padding), "after the end of an answer count"),
    "no attention mask": (_labels(_all_ones), "Padding is read as text by student and teacher"),
    "teacher without mask": (_loss(_masks(True, False)), "The teacher reads padding as text"),
    "student without mask": (_loss(_masks(False, True)), "The student reads padding as text"),
    "generated without mask": (_generated_without_mask, "padding is read as text"),
    "means of micro-batches": (_loss(_micro_batch_means), "1/N within a batch"),
    "own means": (_loss(_own_means), "short rollouts weigh more"),
    "padded means": (_loss(_padded_means), "averages over padded positions"),
    "means with the prompt": (_loss(_with_prompt_means), "prompts and answers together"),
    "first token dropped": (_labels(_drop_first), "first token of each answer gets no gradient"),
    "last token dropped": (_labels(_drop_last), "last token of each answer gets no gradient"),
    "unended answers dropped": (_labels(_drop_unended), "reach the horizon without an end"),
    "teacher one token early": (
        _loss(lambda s, m, i, n: _shifted(s, m, i, n, 0, -1)),
        "teacher is read one token early",
    ),
    "teacher one token late": (_loss(lambda s, m, i, n: _shifted(s, m, i, n, 0, 1)), "teacher is read one token late"),
    "both at temperature 2": (_loss(_tempered(2.0, 2.0)), "both models at temperature 2"),
    "teacher at temperature 2": (_loss(_tempered(1.0, 2.0)), "Only the teacher is scored at temperature 2"),
    "student at temperature 0.5": (_loss(_tempered(0.5, 1.0)), "Only the student is scored at temperature 0.5"),
    "sampled at 0.9": (lambda pair: gkd(pair, temperature=0.9), "samples from the student at temperature 0.9"),
    "top-k sampling": (_sampling(top_k=2), "keeps at most 2 tokens"),
    "the other KL": (lambda pair: gkd(pair, beta=0.0), "descends forward_kl"),
    "a JSD": (lambda pair: gkd(pair, beta=0.5), "descends jsd"),
    "uphill": (_loss(_uphill), "uphill"),
    "detached forward KL": (_loss(_detached_reward), "detached reward"),
    "eval mode": (_eval_mode, "eval mode"),
    "teacher in train mode": (_teacher_learns, "train mode"),
    "prompts cut": (_prompts_cut, "prompts are cut"),
    "prompts doubled": (_prompts_doubled, "prompts are cut"),
    "teacher samples": (lambda pair: gkd(pair, lmbda=0.0, seq_kd=True), "samples from the teacher"),
}

# What cannot be played, and what the error must say.
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "greedy": (_sampling(do_sample=False), "decodes greedily"),
    "reference answers": (lambda pair: gkd(pair, lmbda=0.0), "answers of the dataset"),
    "gradients never cleared": (_never_cleared, "of the step before"),
    "learns at rate 0": (_learns_anyway, "changed the student"),
    "another student": (_wrong_student, "must train pair.student"),
    "no trainer": (lambda pair: object(), "must return a transformers.Trainer"),
    "another batch": (_other_batch, r"pass \*\*pair.arguments"),
}


def _mask_by_token(ids: Tensor, mask: Tensor, labels: Tensor, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padding is token 0; where it is the end of the sequence too, that is dropped."""
    return ids, mask, ids.clone().masked_fill(ids == 0, -100).index_fill(1, torch.arange(prompt), -100)


masks_by_token = _labels(_mask_by_token)
