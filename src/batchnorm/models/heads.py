"""Auxiliary classifiers, which give the lower half of a deep network a gradient of its own."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import Tensor, nn


class AuxiliaryHead(nn.Sequential):
    """5×5 average pool of stride 3, 1×1 convolution, a hidden layer and logits.

    Args:
        reduce: The 1×1 convolution with its nonlinearity.
        features: Numbers that it leaves of one image.
        units: Of the hidden layer.
        classes: Outputs.
        nonlinearity: Of the hidden layer.

    Source: Szegedy et al. (2014), section 5.
    """

    def __init__(
        self,
        reduce: nn.Module,
        features: int,
        units: int,
        classes: int,
        *,
        nonlinearity: Callable[[], nn.Module],
    ) -> None:
        super().__init__(
            OrderedDict(
                pool=nn.AvgPool2d(5, 3),
                reduce=reduce,
                flatten=nn.Flatten(),
                # Not normalized: so the network with one head has the paper's 13.6 million parameters.
                hidden=nn.Linear(features, units),
                activation=nonlinearity(),
                output=nn.Linear(units, classes),
            )
        )


class WithHeads(nn.Sequential):
    """Layers in sequence, some of which also feed a classifier while training.

    Args:
        layers: In order, by name.
        heads: Classifiers by the name of the layer whose output they see, from the top down.
    """

    def __init__(self, layers: "OrderedDict[str, nn.Module]", heads: Mapping[str, nn.Module]) -> None:
        super().__init__(layers)
        self.seen = tuple(heads)
        self._order = tuple(layers)
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits (N, classes); in training mode a tuple of them and those of the heads."""
        said: dict[str, Tensor] = {}
        for name in self._order:
            x = getattr(self, name)(x)
            if self.training and name in self.seen:
                said[name] = self.heads[name](x)
        return (x, *(said[name] for name in self.seen)) if self.training else x
