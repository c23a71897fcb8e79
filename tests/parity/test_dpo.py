"""Our DPO and SFT beside TRL and transformers: one whole step on the same weights and token ids."""

import copy

import pytest
import torch
import transformers
from peers import trl_batch, trl_trainer

import sft
from data import Example, collate
from dpo import objective
from model import Phi, completion_logprobs

VOCABULARY = 300


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(their policy, their reference, our policy, our reference): the policy is the reference after a small push."""
    config = transformers.PhiConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=VOCABULARY,
        partial_rotary_factor=0.5,
        resid_pdrop=0.1,
    )
    torch.manual_seed(0)
    reference = transformers.PhiForCausalLM(config)
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.08)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01 * torch.randn_like(p))
    ours = []
    for name, model in (("policy", policy), ("reference", reference)):
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        ours.append(Phi.from_pretrained(directory))
    return policy, reference, *ours


def pairs(lengths) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return [Example(draw(p), [draw(c), draw(r)]) for p, c, r in lengths]


UNEQUAL = [(9, 5, 12), (3, 20, 4), (17, 8, 8), (1, 2, 30)]
EQUAL = [(9, 7, 7), (3, 7, 7)]


def our_step(policy, reference, examples, loss, beta, eps):
    """Loss, metrics and gradients of one step, by this project's way."""
    batch = collate(examples)
    policy.zero_grad()
    with torch.no_grad():
        expected = completion_logprobs(reference, batch)
    tables = (x.view(-1, 2) for x in (completion_logprobs(policy, batch), expected, batch.lengths))
    total, sums = objective(*tables, loss, beta, eps)
    (total / len(examples)).backward()
    metrics = {name: (value[0] / value[1]).item() for name, value in sums.items()}
    return total.item() / len(examples), metrics, {name: p.grad.clone() for name, p in policy.named_parameters()}


def their_step(directory, policy, reference, examples, **settings):
    trainer = trl_trainer(directory, copy.deepcopy(policy), copy.deepcopy(reference), **settings)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trl_batch(examples))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), metrics, {name: p.grad for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("loss", "beta", "eps"),
    [("sigmoid", 0.1, None), ("sigmoid", 0.5, None), ("robust", 0.1, 0.1), ("robust", 0.3, 0.25), ("hinge", 0.1, None)],
)
def test_a_whole_step_has_trl_s_loss_gradients_and_metrics(models, tmp_path, loss, beta, eps):
    their_policy, their_reference, policy, reference = models
    examples = pairs(UNEQUAL)
    settings = dict(loss_type=loss, beta=beta, label_smoothing=eps or 0.0)
    their_loss, theirs, their_gradients = their_step(tmp_path, their_policy, their_reference, examples, **settings)
    our_loss, ours, gradients = our_step(policy, reference, examples, loss, beta, eps)

    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    largest = max(g.norm() for g in their_gradients.values())
    assert largest > 1e-3
    for name, expected in their_gradients.items():
        assert (gradients[name] - expected).norm() <= 1e-5 * largest, name
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_ipo_is_trl_s_once_its_mean_over_tokens_is_undone(models, tmp_path):
    """TRL averages the log-ratio over an answer's tokens, we sum it as the paper does. With n tokens in every answer, our
    (sum - 1/(2 beta))^2 is n^2 times their (sum/n - 1/(2 beta n))^2: their beta is ours times n."""
    their_policy, their_reference, policy, reference = models
    examples, beta, n = pairs(EQUAL), 0.1, 7
    their_loss, _, _ = their_step(tmp_path, their_policy, their_reference, examples, loss_type="ipo", beta=beta * n)
    our_loss, _, _ = our_step(policy, reference, examples, "ipo", beta, None)
    assert our_loss == pytest.approx(n**2 * their_loss, rel=1e-5)


def test_conservative_is_the_label_smoothed_mean_of_trl_s_sigmoid(models, tmp_path):
    """TRL 1.x has no conservative loss; (1-eps) L(z) + eps L(-z) is its sigmoid loss on pairs and swapped pairs."""
    their_policy, their_reference, policy, reference = models
    examples, eps = pairs(UNEQUAL), 0.2
    swapped = [Example(e.prompt, e.completions[::-1]) for e in examples]
    plain, flipped = (
        their_step(tmp_path, their_policy, their_reference, e, loss_type="sigmoid", beta=0.1)[0] for e in (examples, swapped)
    )
    our_loss, _, _ = our_step(policy, reference, examples, "conservative", 0.1, eps)
    assert our_loss == pytest.approx((1 - eps) * plain + eps * flipped, rel=1e-5)


def test_sft_has_transformers_loss_and_gradients(models):
    """Theirs with label -100 on prompt and padding, and divided by the tokens of the whole batch."""
    their_policy, _, policy, _ = models
    examples = [Example(e.prompt, e.completions[:1]) for e in pairs(UNEQUAL)]
    width = max(len(e) for e in examples)
    ids = torch.tensor([e.prompt + e.completions[0] + [0] * (width - len(e)) for e in examples])
    labels = torch.tensor([[-100] * len(e.prompt) + e.completions[0] + [-100] * (width - len(e)) for e in examples])
    mask = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in examples])
    theirs = copy.deepcopy(their_policy).eval()
    their_loss = theirs(ids, attention_mask=mask, labels=labels).loss
    their_loss.backward()

    batch = collate(examples)
    policy.zero_grad()
    total, _ = sft.objective(completion_logprobs(policy, batch), batch.lengths)
    loss = total / batch.lengths.sum()
    loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    expected = dict(theirs.named_parameters())
    largest = max(p.grad.norm() for p in expected.values())
    for name, p in policy.named_parameters():
        assert (p.grad - expected[name].grad).norm() <= 1e-5 * largest, name
