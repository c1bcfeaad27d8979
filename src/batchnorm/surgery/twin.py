"""What an operation reports of a new model that computes the same as the original and takes its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn, optim

from batchnorm.surgery.agreement import Agreement
from batchnorm.surgery.outcome import SurgeryReport, table


@dataclass(frozen=True)
class TwinReport(SurgeryReport):
    """What was changed, how closely the two models agree, and what an optimizer needs to go on.

    Attributes:
        agreement: For each mode the largest differences on the example.
        parameters: The new model's parameters by the original's.
    """

    agreement: tuple[Agreement, ...] = ()
    parameters: Mapping[Tensor, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def repoint(self, optimizer: optim.Optimizer) -> None:
        """Let an optimizer of the original train the new model: groups, options and state stay.

        Args:
            optimizer: Changed in place; parameters of other models in it stay as they are.

        Raises:
            ValueError: None of its parameters is one of the original model.
        """
        if not any(p in self.parameters for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "none of the optimizer's parameters belongs to the model that was given; "
                "give the optimizer that was made for it, before it is used for another"
            )
        for group in optimizer.param_groups:
            group["params"] = [self.parameters.get(p, p) for p in group["params"]]
        state = {self.parameters.get(p, p): value for p, value in optimizer.state.items()}
        optimizer.state.clear()
        optimizer.state.update(state)

    def __str__(self) -> str:
        head = ("mode", "outputs", "input gradients", "parameter gradients", "statistics", "allowed")
        rows = [
            (
                a.mode,
                *(
                    f"{v:.1e}"
                    for v in (a.outputs, a.input_gradients, a.parameter_gradients, a.statistics, a.allowed)
                ),
            )
            for a in self.agreement
        ]
        parts = [super().__str__(), table("before and after, relative differences", rows, head)]
        return "\n".join(part for part in parts if part)


def parameters_by_original(model: nn.Module, new: nn.Module) -> dict[Tensor, Tensor]:
    """The parameters of a new model by those of the original, which have the same names."""
    return {parameter: new.get_parameter(name) for name, parameter in model.named_parameters()}


def check_agreement(agreement: Sequence[Agreement], done: str, advice: str) -> None:
    """Refuse a result that computes something else.

    Args:
        agreement: Of the original and the new model.
        done: What the new model is, such as ``accelerated``.
        advice: What to do, for the message.

    Raises:
        RuntimeError: A difference is larger than rounding explains.
    """
    for a in agreement:
        if not a.largest <= a.allowed:
            raise RuntimeError(
                f"in {a.mode} the {done} model differs from the original by {a.largest:.1e} (outputs "
                f"{a.outputs:.1e}, gradients of inputs {a.input_gradients:.1e} and of parameters "
                f"{a.parameter_gradients:.1e}, statistics {a.statistics:.1e}) where rounding explains "
                f"{a.allowed:.1e}, so something in its forward was not understood; {advice}"
            )
