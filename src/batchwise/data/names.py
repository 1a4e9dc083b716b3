"""Names that a base class keeps for itself. A subclass that uses one is refused at once."""

from inspect import isfunction

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
"""Methods of Lightning's data modules that the engine keeps."""


class Reserved:
    """A base class whose methods are not replaced by accident.

    A method with `typing.final` cannot be overridden, and no method can be hidden by an attribute of the same name.
    Private attributes begin with two underscores, so that they cannot collide with those of a subclass.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Check the names of a subclass.

        Raises:
            TypeError: it overrides a final method.
        """
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if any(is_final(vars(base).get(name)) for base in cls.__mro__[1:]):
                remedy = "return the examples in load" if name in LOADERS else "choose another name"
                raise TypeError(f"{cls.__name__}.{name} replaces what its base class uses: {remedy}")

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, but not in the place of a method.

        Raises:
            ValueError: there is a method of that name.
        """
        member = getattr(type(self), name, None)
        if isfunction(member) or (isinstance(member, property) and member.fset is None):
            raise ValueError(f"{type(self).__name__} sets self.{name}, which its base class uses: choose another name")
        super().__setattr__(name, value)


def is_final(member: object) -> bool:
    """Return whether a method or property is marked with `typing.final`."""
    return getattr(member.fget if isinstance(member, property) else member, "__final__", False)
