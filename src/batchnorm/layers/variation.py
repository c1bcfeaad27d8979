"""What kinds of layers have in common that are a plain one with something else in training or evaluation."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from batchnorm.layers.base import Normalization


class Variation(Normalization):
    """Base of the kinds of layers: each mixes with each of the plain classes.

    A plain layer becomes one of a kind in place (`vary`), and plain again (`plain_again`): parameters,
    statistics, hooks, flags and every reference stay, as it is the class that changes.

    Attributes:
        settings: Names of the attributes which say how, and which a plain layer has not.
        differs: Modes, "training" or "evaluation", in which the kind computes something else than
            the plain layer by intent, and what.
        check_settings: Called with all settings, by name; raises ``ValueError`` unless they make sense.
        own_buffers: Names of buffers that the plain layer has not.
        ended: What to say in a report when a layer is of the kind no more.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    differs: ClassVar[Mapping[str, str]] = {}
    check_settings: ClassVar[Callable[..., None]] = staticmethod(lambda **settings: None)
    own_buffers: ClassVar[tuple[str, ...]] = ()
    ended: ClassVar[str] = ""

    def _vary(self, **settings: Any) -> Self:
        """Take the settings; a kind with buffers of its own adds them here."""
        self.check_settings(**settings)
        for name, value in settings.items():
            setattr(self, name, value)
        return self

    def _unvary(self) -> None:
        """Give up everything that a plain layer has not."""
        for name in self.settings:
            self.__dict__.pop(name, None)
        for name in self.own_buffers:
            self._buffers.pop(name, None)

    def _is_plain(self, x: Tensor, by_running: bool) -> bool:
        return by_running and super()._is_plain(x, by_running)

    @property
    def described(self) -> str:
        """The settings in words, for `repr` and reports."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.settings)

    def extra_repr(self) -> str:
        """What `repr` shows of the layer's settings."""
        return f"{super().extra_repr()}, {self.described}"


def vary(layer: Normalization, cls: type[Variation], **settings: Any) -> Variation:
    """Turn a plain layer of ours into one of a kind, in place.

    Args:
        layer: Exactly one of the plain classes.
        cls: That kind's class for it.
        settings: All of `Variation.settings`.

    Raises:
        ValueError: The settings make no sense.
    """
    cls.check_settings(**settings)
    # By name: to a type checker, an object of this class cannot leave it.
    object.__setattr__(layer, "__class__", cls)
    assert isinstance(layer, Variation)
    return layer._vary(**settings)


def plain_again(layer: Variation, plain: type[Normalization]) -> Normalization:
    """Turn a layer of a kind into the plain one it is made of, in place; undoes `vary`."""
    layer._unvary()
    object.__setattr__(layer, "__class__", plain)
    return layer
