"""PyTorch beside its functional counterpart: questions 18, 21, 31, 44, 49, 50, 51, 54, 58, 59."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cifar_jax import layout
from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import epoch_order
from cifar_jax.errors import CifarJaxError
from cifar_jax.networks.models import ConvNet, ResNet9
from cifar_jax.parity import relative_difference
from cifar_jax.scoring.inference import make_logits, softmax
from cifar_jax.scoring.scores import calibration_error
from cifar_jax.steps.train_step import create_train_state, normalize, train_step
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Measured, Values, Verdict
from claims.markdown import bullets, table
from claims.spread import difference, gain, percent, spread, spread_at
from claims.study import Study

# What float32 leaves of sums of some thousand terms in another order; an error of the algorithm is
# orders of magnitude larger.
_ROUNDING = 1e-4


def _images(study: Study, n: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Normalised training images ``[N, H, W, C]`` and their labels."""
    dataset = study.dataset
    order = epoch_order(len(dataset.train), seed=0, epoch=0)[:n]
    pixels = normalize(jnp.asarray(dataset.train.pixels[order]), dataset.mean, dataset.std)
    return np.asarray(pixels), dataset.train.labels[order]


def _variables(model: nn.Module, shape: tuple[int, int, int], seed: int = 0) -> Any:
    """Initial weights, NumPy leaves."""
    state = create_train_state(model, optax.sgd(0.1), shape, seed)
    return jax.device_get(state.variables)


def _twin(model: ConvNet | ResNet9, variables: Any, shape: tuple[int, int, int]) -> Any:
    """The PyTorch twin of ``model`` with the same weights."""
    from cifar_jax import torch_reference

    twin = torch_reference.make_twin(model, shape)
    torch_reference.load(twin, layout.to_torch(variables, model.torch_layout(shape)))
    return twin


def _raises(call: Callable[[], Any]) -> str:
    """The type of what ``call`` raises; empty if it does not."""
    try:
        with warnings.catch_warnings(action="ignore"):
            call()
    except Exception as error:  # which one is the result
        return type(error).__name__
    return ""


# ------------------------------------------------------------------------- 18: nn.Sequential


def measure_sequential(study: Study) -> Measured:
    """Run a plain stack and a residual network written by hand and as one ``nn.Sequential``.

    The stack is the tutorial's. The residual network: its own ``forward``; the same layers in a row
    in one ``nn.Sequential``; and a ``nn.Sequential`` in which each branch with its addition is one
    layer. Flax's resnet9, which is built so, has the same weights. The claim fails if the container
    changes what a stack gives, or if a residual network can be put in a row. A caveat if branches
    fit as layers. Cost: seconds.
    """
    from cifar_jax import torch_reference  # before torch

    import torch  # isort: skip

    shape = study.dataset.image_shape
    images, _ = _images(study, 8)
    x = torch.tensor(layout.nhwc_to_nchw(images))
    stack = torch_reference.make_twin(ConvNet(num_classes=10, widths=(4, 8), hidden=(16,)), shape)
    resnet = ResNet9(num_classes=10, widths=(4, 4, 8, 8))
    variables = _variables(resnet, shape)
    twin = _twin(resnet, variables, shape).eval()

    class Residual(torch.nn.Module):
        def __init__(self, branch: torch.nn.Module) -> None:
            super().__init__()
            self.branch = branch

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.branch(x)

    blocks = (twin.conv1, twin.conv2, twin.res1, twin.conv3, twin.conv4, twin.res2, twin.classifier)
    row = torch.nn.Sequential(*blocks)
    wrapped = torch.nn.Sequential(
        *(Residual(b) if b in (twin.res1, twin.res2) else b for b in blocks)
    )
    with torch.no_grad():
        by_hand = x
        for layer in stack.network:
            by_hand = layer(by_hand)
        true = twin(x).numpy()
        values = {
            "stack_container_difference": relative_difference(
                stack.network(x).numpy(), by_hand.numpy()
            ),
            "residual_in_a_row_difference": relative_difference(0.125 * row(x).numpy(), true),
            "residual_branches_as_layers_difference": relative_difference(
                0.125 * wrapped(x).numpy(), true
            ),
        }
    ours = np.asarray(jax.jit(resnet.apply)(variables, images))
    values["flax_sequential_of_branches_difference"] = relative_difference(ours, true)
    return Measured(values, n=1)


def judge_sequential(values: Values) -> Verdict:
    stack, row = values["stack_container_difference"], values["residual_in_a_row_difference"]
    wrapped = values["residual_branches_as_layers_difference"]
    evidence = table(
        ("`nn.Sequential` of", "difference from the network written by hand"),
        [
            ("the layers of a plain stack", f"{stack:.2g}"),
            ("the layers of a residual network", f"{row:.2g}"),
            ("the same, each branch with its addition as one layer", f"{wrapped:.2g}"),
            (
                "Flax's resnet9, which is built so",
                f"{values['flax_sequential_of_branches_difference']:.2g}",
            ),
        ],
    )
    evidence += "\n\nDifferences are relative to the largest logit."
    if stack > 0:
        return Verdict(FAILS, "The container changes what a plain stack gives.", evidence)
    if row < _ROUNDING:
        return Verdict(FAILS, "A residual network can be put in a row as it is.", evidence)
    if wrapped < _ROUNDING:
        return Verdict(
            CAVEAT,
            "A plain stack gives the same bits in the container, and the layers of a residual "
            f"network in a row are off by {100 * row:.0f} %. But networks with branches fit too, "
            "if each branch with its addition is one layer.",
            evidence,
        )
    return Verdict(
        HOLDS, "A plain stack can be put in the container, a residual network cannot.", evidence
    )


# ------------------------------------------------------------- 21: a function in a Sequential


def measure_function_in_sequential(study: Study) -> Measured:
    """Put the function and the module ReLU into ``nn.Sequential`` of PyTorch, and of Flax.

    The claim fails if PyTorch accepts the function, or if the module gives anything else. Cost: a
    second.
    """
    import cifar_jax.torch_reference  # noqa: F401 - before torch

    import torch  # isort: skip

    images, _ = _images(study, 4)
    x = torch.tensor(layout.nhwc_to_nchw(images))
    conv = torch.nn.Conv2d(x.shape[1], 4, 3, padding=1)
    with torch.no_grad():
        in_forward = torch.nn.functional.relu(conv(x)).numpy()
        as_module = torch.nn.Sequential(conv, torch.nn.ReLU())(x).numpy()
    flax = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu])
    output, _ = flax.init_with_output(jax.random.key(0), images)
    return Measured(
        {
            "torch_sequential_of_function_raises": _raises(
                lambda: torch.nn.Sequential(conv, torch.nn.functional.relu)
            ),
            "torch_function_against_module_difference": relative_difference(as_module, in_forward),
            "flax_sequential_of_function_raises": _raises(
                lambda: flax.init(jax.random.key(0), images)
            ),
            "flax_smallest_output": float(output.min()),
        },
        n=1,
    )


def judge_function_in_sequential(values: Values) -> Verdict:
    theirs = values["torch_sequential_of_function_raises"]
    ours = values["flax_sequential_of_function_raises"]
    off = values["torch_function_against_module_difference"]
    evidence = bullets(
        f"PyTorch, given the function: {theirs or 'no error'}",
        f"difference of `nn.ReLU` in the container and the function: {off:.2g}",
        f"Flax, given the function: {ours or 'no error'}",
    )
    if not theirs:
        return Verdict(FAILS, "PyTorch's nn.Sequential takes the function F.relu.", evidence)
    if off > _ROUNDING:
        return Verdict(FAILS, "nn.ReLU does not give what F.relu does.", evidence)
    finding = f"PyTorch raises {theirs} for the function and takes the module."
    if not ours and values["flax_smallest_output"] >= 0:
        finding += " Flax's nn.Sequential, of which the claim does not speak, takes any function."
    return Verdict(HOLDS, finding, evidence)


# ------------------------------------------------------------------ 31: __call__ and forward


def measure_call_and_forward(study: Study) -> Measured:
    """Count what a hook sees, and compare outputs and gradients, of ``model(x)`` and ``.forward``.

    Flax's counterparts: a module is called only inside ``apply``, and ``nn.intercept_methods`` sees
    ``__call__`` and every other method. The claim fails if ``forward`` runs hooks too. A caveat if
    the gradients are the same without the "set-up of autodiff". Cost: a second.
    """
    from cifar_jax import torch_reference  # before torch

    import torch  # isort: skip

    images, _ = _images(study, 4)
    model = ConvNet(num_classes=10, widths=(4,), hidden=())
    twin = torch_reference.make_twin(model, study.dataset.image_shape)
    seen: list[str] = []
    twin.register_forward_hook(lambda *_: seen.append("torch"))
    x = torch.tensor(layout.nhwc_to_nchw(images))

    def run(call: Callable[[Any], Any]) -> tuple[int, Any, list[Any]]:
        seen.clear()
        twin.zero_grad()
        output = call(x)
        output.square().sum().backward()
        return (
            len(seen),
            output.detach().numpy(),
            [p.grad.numpy().copy() for p in twin.parameters()],
        )

    calls, output, grads = run(twin)
    forward_calls, forward_output, forward_grads = run(twin.forward)

    class WithTwoMethods(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(2)(x.reshape(len(x), -1))

        def doubled(self, x: Any) -> Any:
            return 2 * x

    intercepted: list[str] = []

    def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, WithTwoMethods):
            intercepted.append(context.method_name)
        return method(*args, **kwargs)

    flax = WithTwoMethods()
    variables = flax.init(jax.random.key(0), images)
    with nn.intercept_methods(intercept):
        flax.apply(variables, images)
        flax.apply(variables, images, method="doubled")
    return Measured(
        {
            "hook_runs_by_call": calls,
            "hook_runs_by_forward": forward_calls,
            "output_difference": relative_difference(forward_output, output),
            "gradient_difference": max(map(relative_difference, forward_grads, grads)),
            "flax_methods_intercepted": intercepted,
            "flax_call_without_apply_raises": _raises(lambda: flax(images)),
        },
        n=1,
    )


def judge_call_and_forward(values: Values) -> Verdict:
    by_call, by_forward = values["hook_runs_by_call"], values["hook_runs_by_forward"]
    gradient = values["gradient_difference"]
    evidence = table(
        ("", "`model(x)`", "`model.forward(x)`"),
        [("times that a hook runs", str(by_call), str(by_forward))],
    )
    evidence += "\n\n" + bullets(
        f"difference of the outputs: {values['output_difference']:.2g}",
        f"difference of the gradients: {gradient:.2g}",
        "Flax has no second way: a call without `apply` raises "
        f"{values['flax_call_without_apply_raises']}, and an interceptor sees "
        f"{' and '.join(f'`{name}`' for name in values['flax_methods_intercepted'])}",
    )
    if by_call != 1 or by_forward != 0:
        return Verdict(FAILS, "Hooks do not depend on which of the two is called.", evidence)
    if gradient == 0:
        return Verdict(
            CAVEAT,
            "Only model(x) runs hooks. But autodiff needs no set-up there: by model.forward(x) the "
            "output and all gradients have the same bits.",
            evidence,
        )
    return Verdict(HOLDS, "Forward runs no hooks and gives other gradients.", evidence)


# ------------------------------------------------------------ 44: cross-entropy, one or many


def _loss_by_name(name: str, logits: Any, labels: Any) -> Any:
    if name == "cross_entropy":
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.sigmoid_binary_cross_entropy(logits, one_hot).sum(axis=-1).mean()


def _train_with_loss(study: Study, name: str, seed: int) -> tuple[float, NDArray[np.float64]]:
    """Validation accuracy in percent, and the logits of the validation images."""
    dataset = study.dataset
    train = study.subset(study.scaled(10_000, 500))
    model = ConvNet(
        num_classes=len(dataset.class_names),
        widths=(4,) if study.quick else (16, 32, 64),
        hidden=(),
    )
    tx = optax.adam(1e-3)
    params = _variables(model, dataset.image_shape, seed)["params"]

    def apply(params: Any, pixels: Any) -> jax.Array:
        return model.apply({"params": params}, normalize(pixels, dataset.mean, dataset.std))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, pixels: Any, labels: Any) -> tuple[Any, Any]:
        grads = jax.grad(lambda p: _loss_by_name(name, apply(p, pixels), labels))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = jax.device_put(params), tx.init(params)
    for epoch in range(study.scaled(8, 1)):
        order = epoch_order(len(train), seed, epoch)
        for indices in order[: len(train) // 128 * 128].reshape(-1, 128):
            params, opt_state = step(
                params, opt_state, train.pixels[indices], train.labels[indices]
            )
    run = jax.jit(apply)
    pieces = np.array_split(dataset.val.pixels, max(len(dataset.val) // 500, 1))
    logits = np.concatenate([np.asarray(run(params, piece)) for piece in pieces])
    return 100 * float(np.mean(logits.argmax(-1) == dataset.val.labels)), logits.astype(np.float64)


def _best_probabilities_of_two_tags(loss: Callable[[Any], Any], to: Callable[[Any], Any]) -> float:
    """The lower probability of two tags that are both right, after minimizing over the logits."""
    tx = optax.adam(0.1)
    logits = jnp.zeros(10)

    def step(_: Any, carry: Any) -> Any:
        logits, state = carry
        updates, state = tx.update(jax.grad(loss)(logits), state)
        return optax.apply_updates(logits, updates), state

    logits, _ = jax.lax.fori_loop(0, 500, step, (logits, tx.init(logits)))
    return float(to(logits)[:2].min())


def measure_cross_entropies(study: Study) -> Measured:
    """Compare both losses on two classes, on an image with two tags, and in training ten classes.

    Two classes: softmax of (0, z) against the sigmoid of z, in PyTorch, in float64. Two tags: the
    logits are minimised directly. Ten classes: the tutorial's convolutions with one Dense layer on
    10,000 images for 8 epochs, by each loss. How far ten sigmoids miss a sum of 1 is shown, and
    decides nothing. The claim fails if the losses differ for two classes, or if cross-entropy can
    give both tags. A caveat unless cross-entropy is clearly better on CIFAR-10. Cost: 3 minutes.
    """
    import cifar_jax.torch_reference  # noqa: F401 - before torch

    import torch  # isort: skip
    from torch.nn import functional as F

    z = torch.linspace(-20, 20, 401, dtype=torch.float64)
    two_classes = F.cross_entropy(
        torch.stack([torch.zeros_like(z), z], dim=1),
        torch.ones(len(z), dtype=torch.int64),
        reduction="none",
    )
    yes_or_no = F.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="none")
    target = jnp.zeros(10).at[:2].set(1)
    accuracies: dict[str, list[float]] = {}
    logits: dict[str, Any] = {}
    for name in ("cross_entropy", "binary_cross_entropy"):
        runs = [_train_with_loss(study, name, seed) for seed in study.seeds]
        accuracies[name], logits[name] = [a for a, _ in runs], runs[0][1]
    sums = (1 / (1 + np.exp(-logits["binary_cross_entropy"]))).sum(axis=-1)
    return Measured(
        {
            "two_classes_difference": float((two_classes - yes_or_no).abs().max()),
            "two_tags_cross_entropy_percent": 100
            * _best_probabilities_of_two_tags(
                lambda x: optax.softmax_cross_entropy(x, target / 2), jax.nn.softmax
            ),
            "two_tags_binary_percent": 100
            * _best_probabilities_of_two_tags(
                lambda x: optax.sigmoid_binary_cross_entropy(x, target).sum(), jax.nn.sigmoid
            ),
            "softmax_sum_deviation": float(
                np.abs(softmax(logits["cross_entropy"]).sum(axis=-1) - 1).max()
            ),
            "sigmoids_sum_deviation": float(np.abs(sums - 1).mean()),
            "trained_by_cross_entropy": spread(accuracies["cross_entropy"]),
            "trained_by_binary_cross_entropy": spread(accuracies["binary_cross_entropy"]),
        },
        n=len(study.seeds),
    )


def judge_cross_entropies(values: Values) -> Verdict:
    two = values["two_classes_difference"]
    one_tag, both_tags = values["two_tags_cross_entropy_percent"], values["two_tags_binary_percent"]
    ours, other = values["trained_by_cross_entropy"], values["trained_by_binary_cross_entropy"]
    off = values["sigmoids_sum_deviation"]
    evidence = table(
        ("", "cross-entropy", "binary cross-entropy"),
        [
            ("probability of each of two tags", f"{one_tag:.0f} %", f"{both_tags:.0f} %"),
            ("validation accuracy, ten classes", percent(ours), percent(other)),
            (
                "how far the probabilities miss a sum of 1",
                f"{values['softmax_sum_deviation']:.2g}",
                f"{off:.2f}",
            ),
        ],
    )
    evidence += "\n\n" + bullets(f"difference of the two losses for two classes: {two:.2g}")
    if two > 1e-9:
        return Verdict(FAILS, "For two classes the two are different losses.", evidence)
    if one_tag > 60 or both_tags < 90:  # 50 is the most for each of two that sum to 100
        return Verdict(
            FAILS, "Cross-entropy gives both tags, or binary cross-entropy does not.", evidence
        )
    finding = "For two classes the losses are the same, and for tags it must be the binary one."
    points, clear = difference(ours, other)
    if not clear or points < 0:
        return Verdict(
            CAVEAT,
            f"{finding} But for ten classes cross-entropy is not clearly more accurate "
            f"({gain(ours, other)} points).",
            evidence,
        )
    return Verdict(
        HOLDS,
        f"{finding} For ten classes cross-entropy is more accurate ({gain(ours, other)} points).",
        evidence,
    )


# ---------------------------------------------------------------- 49: the probability of a frog


def measure_frog(study: Study) -> Measured:
    """``F.softmax(model(image), dim=1)[:, 6]`` of the trained tutorial's network, and ours.

    The weights of the default run are moved to PyTorch. Which class has index 6? Do probabilities
    sum to 1, and logits not? Is a probability a percentage: are images with a confidence of p right
    in p of the cases (expected calibration error)? The claim fails if the probabilities do not sum
    to 1 or are not JAX's, or if logits sum to 1 as well. A caveat if index 6 is another class, as
    the tutorial only assumes that it is frog, or if percentages are off by more than 5 points.
    Cost: seconds, after the default run, which is shared.
    """
    from cifar_jax import torch_reference

    dataset = study.dataset
    config = TrainConfig(epochs=study.scaled(10, 1))
    val = dataset.val
    errors, sums, gaps, differences, frogs, others = [], [], [], [], [], []
    shown = None
    for seed in study.seeds:
        fitted = study.fit(config, seed=seed)
        network = TrainedNetwork(
            config,
            dataset.class_names,
            dataset.image_shape,
            dataset.mean,
            dataset.std,
            fitted.variables,
        )
        ours = softmax(make_logits(network)(val.pixels))
        assert isinstance(fitted.model, ConvNet)
        twin = _twin(fitted.model, fitted.variables, dataset.image_shape)
        images = np.asarray(normalize(jnp.asarray(val.pixels), dataset.mean, dataset.std))
        logits = torch_reference.logits(twin, layout.nhwc_to_nchw(images))
        theirs = _torch_softmax(logits)
        differences.append(float(np.abs(ours - theirs).max()))
        sums.append(float(np.abs(theirs.sum(axis=1) - 1).max()))
        gaps.append(float(np.abs(logits.sum(axis=1) - 1).mean()))
        confidence, right = theirs.max(axis=1), theirs.argmax(axis=1) == val.labels
        errors.append(100 * calibration_error(confidence.astype(np.float64), right)[0])
        frog = val.labels == 6
        frogs.append(100 * float(theirs[frog, 6].mean()))
        others.append(100 * float(theirs[~frog, 6].mean()))
        shown = shown or (theirs[frog, 6], theirs[~frog, 6])
    assert shown is not None
    name = dataset.class_names[6]
    figure = _frog_figure(study, name, *shown)
    return Measured(
        {
            "class_of_index_6": name,
            "largest_deviation_of_sum_from_1": max(sums),
            "mean_deviation_of_logits_sum_from_1": float(np.mean(gaps)),
            "largest_difference_to_jax": max(differences),
            "mean_of_images_of_class_6": spread(frogs),
            "mean_of_other_images": spread(others),
            "calibration_error": spread(errors),
        },
        n=len(study.seeds),
        figure=figure,
    )


def _torch_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch

    return torch.nn.functional.softmax(torch.tensor(logits), dim=1).numpy()


def _frog_figure(study: Study, name: str, of_class: Any, of_others: Any) -> str:
    figure = Figure((5, 3.2), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, 100, 21)
    for values, label in ((of_class, f"images of a {name}"), (of_others, "other images")):
        share = np.full(len(values), 100 / len(values))
        axes.hist(100 * values, bins.tolist(), weights=share, alpha=0.6, label=label)
    axes.set(xlabel=f"probability of {name}, index 6 (%)", ylabel="share of the images (%)")
    axes.set_yscale("log")
    axes.legend()
    return study.save_figure(figure, "q49_frog.png")


def judge_frog(values: Values) -> Verdict:
    name, off = values["class_of_index_6"], values["largest_difference_to_jax"]
    error, sums = values["calibration_error"], values["largest_deviation_of_sum_from_1"]
    of_logits = values["mean_deviation_of_logits_sum_from_1"]
    evidence = bullets(
        f"index 6: {name}; its mean probability is {percent(values['mean_of_images_of_class_6'])} "
        f"on images of its class and {percent(values['mean_of_other_images'])} on others",
        f"largest difference of PyTorch's probabilities and JAX's: {off:.2g}",
        f"probabilities miss a sum of 1 by {sums:.2g} at most, logits by "
        f"{of_logits:.1f} on average",
        f"expected calibration error: {percent(error)}",
    )
    if max(off, sums) > _ROUNDING or of_logits < _ROUNDING:
        return Verdict(
            FAILS, "Softmax does not give probabilities, or logits already are some.", evidence
        )
    if name != "frog":
        return Verdict(CAVEAT, f"Index 6 of these classes is {name}.", evidence)
    finding = (
        "Index 6 is frog. Softmax's numbers sum to 1, the logits do not, and PyTorch and JAX "
        "agree. Read as percentages, they are off by "
        f"{error['mean_percent']:.1f} points on average."
    )
    # By 5 points, "90 %" is as likely 85: too far to be read as a percentage.
    return Verdict(CAVEAT if error["mean_percent"] > 5 else HOLDS, finding, evidence)


# -------------------------------------------------------------------- 50: plotting of tensors


def measure_plotting(study: Study) -> Measured:
    """Plot ten losses in each form that they come in, and see which raise an error.

    Also, what a list of losses keeps alive in PyTorch: the activations of their steps, unless
    ``item()`` was called. A tensor on a GPU is not tried. The claim fails if plain tensors are
    plotted, alone and in a list. A caveat if one of the two is. Cost: a second.
    """
    import cifar_jax.torch_reference  # noqa: F401 - before torch

    import torch  # isort: skip

    losses = np.linspace(2.3, 1.0, 10)
    plain = torch.tensor(losses)
    learnt = plain.clone().requires_grad_()
    forms = {
        "list of floats": losses.tolist(),
        "NumPy array": losses,
        "JAX array": jnp.asarray(losses),
        "list of JAX scalars": list(jnp.asarray(losses)),
        "tensor": plain,
        "list of tensors": list(plain),
        "tensor, requires_grad": learnt,
        "list of tensors, requires_grad": list(learnt),
        "tensor, bfloat16": plain.bfloat16(),
        "requires_grad, .cpu().numpy()": lambda: learnt.cpu().numpy(),
        "requires_grad, .detach().cpu().numpy()": lambda: learnt.detach().cpu().numpy(),
        "requires_grad, .tolist()": lambda: learnt.tolist(),
        "list, .item() of each": lambda: [loss.item() for loss in learnt],
    }

    def plot(form: Any) -> None:
        axes = Figure().subplots()
        (line,) = axes.plot(form() if callable(form) else form)
        if not np.allclose(np.asarray(line.get_ydata(), float), losses, atol=0.01):
            raise ArithmeticError("another curve")

    raised = {name: _raises(functools.partial(plot, form)) for name, form in forms.items()}

    def activation_lives(keep: Callable[[Any], Any]) -> bool:
        weight = torch.ones(3, requires_grad=True)
        activation = (weight * 2).exp()
        alive, history = weakref.ref(activation), [keep(activation.square().sum())]
        del activation
        gc.collect()
        lives = alive() is not None
        history.clear()
        return lives

    return Measured(
        {
            "plotted": [name for name, error in raised.items() if not error],
            "raised": {name: error for name, error in raised.items() if error},
            "kept_loss_keeps_activations": activation_lives(lambda loss: loss),
            "kept_item_keeps_activations": activation_lives(lambda loss: loss.item()),
        },
        n=1,
    )


def judge_plotting(values: Values) -> Verdict:
    plotted, raised = values["plotted"], values["raised"]
    evidence = table(
        ("form of the ten losses", ""),
        [*((form, "plotted") for form in plotted), *sorted(raised.items())],
    )
    keeps = values["kept_loss_keeps_activations"]
    if keeps and not values["kept_item_keeps_activations"]:
        evidence += (
            "\n\n`item()` has another use: a loss that is kept as a tensor keeps the activations "
            "of its step in memory."
        )
    if "NumPy array" in raised or "list of floats" in raised:
        return Verdict(FAILS, "A list or a NumPy array cannot be plotted.", evidence)
    plain = [form for form in ("tensor", "list of tensors") if form in plotted]
    if len(plain) == 2:
        finding = "Matplotlib plots a plain tensor on a CPU, alone or in a list."
        if "tensor, requires_grad" in raised:
            finding += " It refuses one that requires a gradient"
            finding += (
                ", but there cpu().numpy() fails as well."
                if "requires_grad, .cpu().numpy()" in raised
                else "."
            )
        return Verdict(FAILS, finding, evidence)
    if plain:
        return Verdict(CAVEAT, f"A plain {plain[0]} is plotted.", evidence)
    return Verdict(HOLDS, "No plain tensor is plotted.", evidence)


# --------------------------------------------------------------------- 51: what torch.save saves

_CLASS_IN_SCRIPT = """
import sys, torch
class OnlyHere(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
    def forward(self, x):
        return self.norm(self.conv(x)) - 12345.678
model = OnlyHere()
torch.save(model.state_dict(), sys.argv[1] + "/weights.pth")
torch.save(model, sys.argv[1] + "/model.pth")
print(sum(p.numel() for p in model.parameters()))
"""


def measure_torch_save(study: Study) -> Measured:
    """Save weights, and a whole model, in a program with a class that this one does not have.

    Then load both here. The claim fails if the class's code is in a file, or if the model can be
    loaded without the class. A caveat if the weights can. Cost: 3 seconds.
    """
    import cifar_jax.torch_reference  # noqa: F401 - before torch

    import torch  # isort: skip

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _CLASS_IN_SCRIPT, folder],
            check=True,
            capture_output=True,
            text=True,
        )
        weights, model = Path(folder, "weights.pth"), Path(folder, "model.pth")
        contents = {}
        for path in (weights, model):
            with zipfile.ZipFile(path) as archive:
                contents[path] = b"".join(archive.read(name) for name in archive.namelist())
        state_dict = torch.load(weights, weights_only=True)
        return Measured(
            {
                "weights_file_names_the_class": b"OnlyHere" in contents[weights],
                "model_file_names_the_class": b"OnlyHere" in contents[model],
                # The constant of its forward, as text and as a float64, and the source's own words.
                "model_file_has_code": any(
                    piece in contents[model]
                    for piece in (b"12345.678", np.float64(12345.678).tobytes(), b"def forward")
                ),
                "loading_weights_without_class_raises": _raises(
                    lambda: torch.load(weights, weights_only=True)
                ),
                "loading_model_without_class_raises": _raises(
                    lambda: torch.load(model, weights_only=False)
                ),
                "tensors": list(state_dict),
                "numbers_in_weights_file": sum(t.numel() for t in state_dict.values()),
                "trainable_numbers_of_model": int(done.stdout),
            },
            n=1,
        )


def judge_torch_save(values: Values) -> Verdict:
    model_raises = values["loading_model_without_class_raises"]
    weights_raise = values["loading_weights_without_class_raises"]
    numbers, trainable = values["numbers_in_weights_file"], values["trainable_numbers_of_model"]
    evidence = table(
        ("", "file of the weights", "file of the whole model"),
        [
            (
                "loading it without the class",
                weights_raise or f"a dict of {len(values['tensors'])} tensors",
                model_raises or "works",
            ),
            (
                "names the class",
                _yes_or_no(values["weights_file_names_the_class"]),
                _yes_or_no(values["model_file_names_the_class"]),
            ),
            ("has its code", "", _yes_or_no(values["model_file_has_code"])),
        ],
    )
    evidence += "\n\n" + bullets(
        f"numbers in the file of the weights: {numbers}, of which {trainable} are weights and "
        f"biases and {numbers - trainable} statistics of batch norm"
    )
    if values["model_file_has_code"] or values["weights_file_names_the_class"]:
        return Verdict(FAILS, "The class, or its code, is in the file.", evidence)
    if not model_raises:
        return Verdict(FAILS, "A whole model can be loaded without its class.", evidence)
    if not weights_raise:
        return Verdict(
            CAVEAT,
            "No code is in the file, and a whole model cannot be loaded without its class. But "
            "weights can: they are a dict of tensors, which also has batch norm's statistics.",
            evidence,
        )
    return Verdict(HOLDS, f"Without the class, loading weights raises {weights_raise}.", evidence)


def _yes_or_no(answer: bool) -> str:
    return "yes" if answer else "no"


# ------------------------------------------------------------------ 54: gradient accumulation


def measure_accumulation(study: Study) -> Measured:
    """Compare the gradient of 128 images with that of four times 32, without and with batch norm.

    In PyTorch by four ``backward()``, as the tutorial writes it and with each loss divided by 4; in
    JAX by this project's ``train_step`` with ``accumulate=4``, where one step of SGD at rate 1 is
    the gradient. Adam divides by the size of the gradient, so a factor should not matter to it: how
    far apart are the weights after 20 steps, as written and with divided losses, by Adam and by SGD
    (rates 1e-3 and 1e-2), without batch norm? The claim fails if the averaged gradients differ by
    more than rounding. A caveat if they must be averaged, or differ with batch norm. Cost: twenty
    seconds.
    """
    import torch  # isort: skip

    dataset = study.dataset
    shape = dataset.image_shape
    indices = epoch_order(len(dataset.train), seed=0, epoch=0)[:128]
    batch = {"image": dataset.train.pixels[indices], "label": dataset.train.labels[indices]}
    steps = study.scaled(20, 2)
    images, labels = _images(study, 128 * steps)
    x, y = torch.tensor(layout.nhwc_to_nchw(images)), torch.tensor(labels).long()
    tx = optax.sgd(1.0)

    def ours(model: ConvNet, accumulate: int) -> NDArray[np.float32]:
        state = create_train_state(model, tx, shape, seed=0)
        step = functools.partial(
            train_step,
            model=model,
            tx=tx,
            augment=lambda key, image: image,
            mean=dataset.mean,
            std=dataset.std,
            seed=0,
            accumulate=accumulate,
        )
        after, _ = jax.jit(step)(state, batch)
        moves = jax.tree.map(lambda a, b: np.ravel(a - b), state.params, after.params)
        return np.concatenate(jax.tree.leaves(moves))

    def backward(twin: Any, step: int, parts: int, divisor: int) -> None:
        twin.zero_grad()
        chosen = slice(128 * step, 128 * (step + 1))
        for some, right in zip(x[chosen].chunk(parts), y[chosen].chunk(parts), strict=True):
            (torch.nn.functional.cross_entropy(twin(some), right) / divisor).backward()

    def theirs(model: ConvNet, parts: int, divisor: int) -> NDArray[np.float32]:
        twin = _twin(model, _variables(model, shape), shape).train()
        backward(twin, 0, parts, divisor)
        return np.concatenate([p.grad.numpy().ravel() for p in twin.parameters()])

    def movement(optimizer: Callable[..., Any], rate: float, divisor: int) -> NDArray[np.float32]:
        twin = _twin(plain, _variables(plain, shape), shape).train()
        before = torch.nn.utils.parameters_to_vector(twin.parameters()).detach().clone()
        stepper = optimizer(twin.parameters(), lr=rate)
        for step in range(steps):
            backward(twin, step, 4, divisor)
            stepper.step()
        after = torch.nn.utils.parameters_to_vector(twin.parameters()).detach()
        return (after - before).numpy()

    def movements_apart(optimizer: Callable[..., Any], rate: float) -> float:
        summed, divided = (movement(optimizer, rate, divisor) for divisor in (1, 4))
        return float(np.linalg.norm(summed - divided) / np.linalg.norm(divided))

    widths = (4,) if study.quick else (16, 32, 64)
    plain = ConvNet(num_classes=len(dataset.class_names), widths=widths, hidden=())
    normed = plain.clone(batch_norm=True)
    at_once = theirs(plain, 1, 1)
    return Measured(
        {
            "torch_summed_over_at_once": float(
                np.linalg.norm(theirs(plain, 4, 1)) / np.linalg.norm(at_once)
            ),
            "steps": steps,
            "adam_movement_difference": movements_apart(torch.optim.Adam, 1e-3),
            "sgd_movement_difference": movements_apart(torch.optim.SGD, 1e-2),
            "torch_divided_difference": relative_difference(theirs(plain, 4, 4), at_once),
            "jax_difference": relative_difference(ours(plain, 4), ours(plain, 1)),
            "torch_batch_norm_difference": relative_difference(
                theirs(normed, 4, 4), theirs(normed, 1, 1)
            ),
            "jax_batch_norm_difference": relative_difference(ours(normed, 4), ours(normed, 1)),
        },
        n=1,
    )


def judge_accumulation(values: Values) -> Verdict:
    ratio = values["torch_summed_over_at_once"]
    plain = max(values["torch_divided_difference"], values["jax_difference"])
    normed = min(values["torch_batch_norm_difference"], values["jax_batch_norm_difference"])
    adam, sgd = (100 * values[f"{name}_movement_difference"] for name in ("adam", "sgd"))
    evidence = table(
        ("difference of the gradients, 4 times 32 images and 128 at once", "PyTorch", "JAX"),
        [
            (
                "each loss divided by 4",
                f"{values['torch_divided_difference']:.2g}",
                f"{values['jax_difference']:.2g}",
            ),
            (
                "the same with batch norm",
                f"{values['torch_batch_norm_difference']:.2g}",
                f"{values['jax_batch_norm_difference']:.2g}",
            ),
        ],
    )
    evidence += "\n\n" + bullets(
        f"as the tutorial writes it, the gradient is {ratio:.2f} times that of 128 images",
        f"that moves the weights off in {values['steps']} steps by {sgd:.0f} % with SGD and by "
        f"{adam:.1g} % with Adam, which divides by the size of the gradient",
    )
    if plain > _ROUNDING:
        return Verdict(FAILS, "Even averaged, they give other gradients.", evidence)
    caveats = []
    if abs(ratio - 1) > 0.01:
        caveats.append(
            f"As the tutorial writes it, the gradient is {ratio:.0f} times as large, which matters "
            "to SGD and hardly to Adam."
        )
    if normed > _ROUNDING:
        caveats.append(
            "With batch norm, which normalises each 32 images on their own, it is another gradient "
            f"({100 * normed:.0f} % off)."
        )
    finding = "Up to rounding, the mean over four times 32 images is the gradient of 128."
    return Verdict(CAVEAT if caveats else HOLDS, " ".join([finding, *caveats]), evidence)


# ------------------------------------------------------------------------ 58: the ending .pth


def measure_ending(study: Study) -> Measured:
    """Save the same weights under five names, and read them with PyTorch and with this project.

    The claim fails if PyTorch refuses a name or reads other numbers. Cost: a second.
    """
    import cifar_jax.torch_reference  # noqa: F401 - before torch

    import torch  # isort: skip

    from cifar_jax.state_dicts import read_state_dict

    state_dict = torch.nn.Linear(3, 2).state_dict()
    same, refused = [], []
    with tempfile.TemporaryDirectory() as folder:
        for ending in (".pth", ".pt", ".txt", ".jpg", ""):
            path = Path(folder, f"weights{ending}")
            torch.save(state_dict, path)
            if _raises(functools.partial(torch.load, path, weights_only=True)):
                continue
            loaded = torch.load(path, weights_only=True)
            if all(torch.equal(loaded[name], state_dict[name]) for name in state_dict):
                same.append(ending)
            try:
                read_state_dict(path)
            except CifarJaxError:
                refused.append(ending)
    return Measured(
        {"endings_tried": 5, "torch_reads_the_same": same, "cifar_jax_refuses": refused}, n=1
    )


def judge_ending(values: Values) -> Verdict:
    same, tried = values["torch_reads_the_same"], values["endings_tried"]
    refused = [ending or "none" for ending in values["cifar_jax_refuses"]]
    evidence = bullets(
        "PyTorch reads the same bits from a file with the ending "
        + ", ".join(f"`{ending}`" if ending else "none" for ending in same),
        f"`cifar_jax.convert` refuses {', '.join(refused) or 'none'}",
    )
    if len(same) < tried:
        return Verdict(FAILS, f"PyTorch reads {len(same)} of {tried} names.", evidence)
    finding = f"PyTorch writes and reads the same bits under all {tried} names."
    if refused:
        finding += " Tools that tell formats by the ending do care, such as this project's."
    return Verdict(HOLDS, finding, evidence)


# --------------------------------------------------------------------------- 59: zero_grad


def measure_zero_grad(study: Study) -> Measured:
    """Compare gradients after one and two ``backward()``, and training with and without clearing.

    In JAX, ``jax.grad`` twice. Training: a small network, SGD at 0.05, 200 batches of 128, the mean
    loss of the last 20, with and without ``zero_grad()``. The claim fails if the second gradient is
    not twice the first. A caveat if training without clearing is as good. Cost: half a minute.
    """
    import torch  # isort: skip

    dataset = study.dataset
    shape = dataset.image_shape
    model = ConvNet(num_classes=len(dataset.class_names), widths=(8, 16), hidden=())
    images, labels = _images(study, study.scaled(10_000, 256))
    x, y = torch.tensor(layout.nhwc_to_nchw(images)), torch.tensor(labels).long()
    cross_entropy = torch.nn.functional.cross_entropy

    twin = _twin(model, _variables(model, shape), shape)

    def backward() -> float:
        cross_entropy(twin(x[:32]), y[:32]).backward()
        return float(np.sqrt(sum(float((p.grad**2).sum()) for p in twin.parameters())))

    once, twice = backward(), backward()

    def loss(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, images[:32])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[:32]).mean()

    params = _variables(model, shape)["params"]
    gradient = jax.jit(jax.grad(loss))
    norms = [float(optax.global_norm(gradient(params))) for _ in range(2)]

    def final_loss(seed: int, clears: bool) -> float:
        twin = _twin(model, _variables(model, shape, seed), shape)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
        steps, losses = study.scaled(200, 20), []
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            indices = torch.tensor(rng.integers(len(x), size=128))
            if clears:
                optimizer.zero_grad()
            value = cross_entropy(twin(x[indices]), y[indices])
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return float(np.mean(losses[-max(steps // 10, 1) :]))

    cleared = [final_loss(seed, True) for seed in study.seeds]
    mixed = [final_loss(seed, False) for seed in study.seeds]
    return Measured(
        {
            "torch_second_over_first_gradient": twice / once,
            "jax_second_over_first_gradient": norms[1] / norms[0],
            "loss_with_zero_grad_nats": cleared,
            "loss_without_zero_grad_nats": mixed,
        },
        n=len(study.seeds),
    )


def judge_zero_grad(values: Values) -> Verdict:
    ratio, jax_ratio = (values[f"{f}_second_over_first_gradient"] for f in ("torch", "jax"))
    cleared, mixed = values["loss_with_zero_grad_nats"], values["loss_without_zero_grad_nats"]
    evidence = bullets(
        f"after the second `backward()`, PyTorch's gradient is {ratio:.3f} times the first; that "
        f"of `jax.grad`, which has no buffer, {jax_ratio:.3f} times",
        f"training loss with `zero_grad()`: {np.mean(cleared):.2f} nats; without: "
        f"{np.mean(mixed):.2f}",
    )
    if abs(ratio - 2) > _ROUNDING:
        return Verdict(FAILS, "The second backward() does not add to the first.", evidence)
    # NaN, which a run that blows up ends in, is worse than any number.
    if max(cleared) < min(mixed) or np.isnan(mixed).any():
        return Verdict(
            HOLDS,
            "The second backward() doubles the gradient, and without zero_grad() the loss ends at "
            f"{np.mean(mixed):.2f} instead of {np.mean(cleared):.2f}.",
            evidence,
        )
    return Verdict(
        CAVEAT, "The second backward() doubles the gradient, but training hardly minds.", evidence
    )


CLAIMS = [
    Claim(
        question=18,
        says="nn.Sequential packs a plain stack of layers into one container, so that forward is "
        "one call; it is for stacks without branches such as a ResNet's.",
        measure=measure_sequential,
        judge=judge_sequential,
        refuted_by={
            "stack_container_difference": 0.0,
            "residual_in_a_row_difference": 0.0,
            "residual_branches_as_layers_difference": 0.0,
            "flax_sequential_of_branches_difference": 0.0,
        },
    ),
    Claim(
        question=21,
        says="nn.Sequential takes modules only: F.relu cannot go in, nn.ReLU can.",
        measure=measure_function_in_sequential,
        judge=judge_function_in_sequential,
        refuted_by={
            "torch_sequential_of_function_raises": "",
            "torch_function_against_module_difference": 0.0,
            "flax_sequential_of_function_raises": "",
            "flax_smallest_output": 0.0,
        },
    ),
    Claim(
        question=31,
        says="model(images) runs __call__, which handles hooks and the set-up of autodiff and then "
        "calls forward; forward is never to be called directly.",
        measure=measure_call_and_forward,
        judge=judge_call_and_forward,
        refuted_by={
            "hook_runs_by_call": 1,
            "hook_runs_by_forward": 1,
            "output_difference": 0.0,
            "gradient_difference": 0.0,
            "flax_methods_intercepted": [],
            "flax_call_without_apply_raises": "",
        },
    ),
    Claim(
        question=44,
        says="Cross-entropy is for several classes that exclude each other, binary cross-entropy "
        "for two classes or several tags; so CIFAR-10 takes cross-entropy.",
        measure=measure_cross_entropies,
        judge=judge_cross_entropies,
        refuted_by={
            "two_classes_difference": 0.1,
            "two_tags_cross_entropy_percent": 50.0,
            "two_tags_binary_percent": 100.0,
            "softmax_sum_deviation": 0.0,
            "sigmoids_sum_deviation": 0.0,
            "trained_by_cross_entropy": spread_at(60.0),
            "trained_by_binary_cross_entropy": spread_at(60.0),
        },
    ),
    Claim(
        question=49,
        says="softmax(logits)[6] is the probability of frog; logits are no percentages until then.",
        measure=measure_frog,
        judge=judge_frog,
        refuted_by={
            "class_of_index_6": "frog",
            "largest_deviation_of_sum_from_1": 0.3,
            "mean_deviation_of_logits_sum_from_1": 0.0,
            "largest_difference_to_jax": 0.2,
            "mean_of_images_of_class_6": spread_at(10.0),
            "mean_of_other_images": spread_at(10.0),
            "calibration_error": spread_at(1.0),
        },
    ),
    Claim(
        question=50,
        says="Matplotlib plots lists and NumPy arrays, not PyTorch's tensors, which item() or "
        "cpu().numpy() converts.",
        measure=measure_plotting,
        judge=judge_plotting,
        refuted_by={
            "plotted": ["list of floats", "NumPy array"],
            "raised": {"tensor": "TypeError", "list of tensors": "TypeError"},
            "kept_loss_keeps_activations": False,
            "kept_item_keeps_activations": False,
        },
    ),
    Claim(
        question=51,
        says="torch.save writes a pickled dictionary of weights and biases without the class's "
        "code, and loading the weights takes the class.",
        measure=measure_torch_save,
        judge=judge_torch_save,
        refuted_by={
            "weights_file_names_the_class": False,
            "model_file_names_the_class": True,
            "model_file_has_code": True,
            "loading_weights_without_class_raises": "",
            "loading_model_without_class_raises": "",
            "tensors": [],
            "numbers_in_weights_file": 0,
            "trainable_numbers_of_model": 0,
        },
    ),
    Claim(
        question=54,
        says="Four backward passes of 32 images and one step are one step of 128, as gradients sum "
        "up.",
        measure=measure_accumulation,
        judge=judge_accumulation,
        refuted_by={
            "torch_summed_over_at_once": 4.0,
            "steps": 20,
            "adam_movement_difference": 1e-4,
            "sgd_movement_difference": 3.0,
            "torch_divided_difference": 0.1,
            "jax_difference": 0.1,
            "torch_batch_norm_difference": 0.1,
            "jax_batch_norm_difference": 0.1,
        },
    ),
    Claim(
        question=58,
        says=".pth is a convention: PyTorch takes any ending.",
        measure=measure_ending,
        judge=judge_ending,
        refuted_by={
            "endings_tried": 5,
            "torch_reads_the_same": [".pth", ".pt"],
            "cifar_jax_refuses": [],
        },
    ),
    Claim(
        question=59,
        says="PyTorch adds each backward pass to the gradients that are there, so they must be "
        "cleared before every batch.",
        measure=measure_zero_grad,
        judge=judge_zero_grad,
        refuted_by={
            "torch_second_over_first_gradient": 1.0,
            "jax_second_over_first_gradient": 1.0,
            "loss_with_zero_grad_nats": [1.8],
            "loss_without_zero_grad_nats": [1.8],
        },
    ),
]
