"""The types of the modules that each entry of a state_dict is in, for patterns as ``<BatchNorm*>``.

Only a trainer can tell, since only it has the model.
"""

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from fedsplit.errors import UsageError
from fedsplit.states.local_keys import type_glob
from fedsplit.states.state_dict import travel_names, unwrap


def types_of(model: torch.nn.Module) -> dict[str, set[str]]:
    """Map each entry of a module, as it travels, to the class names of the modules that it is in.

    Their base classes below ``torch.nn.Module`` are among them. An entry that is no parameter or buffer is left out.
    """
    model = unwrap(model)
    # By the tensors: the name of an entry need not be the way to its module, as with compiled submodules.
    types: dict[int, set[str]] = defaultdict(set)
    for module in model.modules():
        bases = (each for each in type(module).__mro__ if issubclass(each, torch.nn.Module))
        names = {each.__name__ for each in bases if each is not torch.nn.Module}
        for tensor in (*module.parameters(), *module.buffers()):
            types[id(tensor)] |= names
    state = model.state_dict(keep_vars=True)
    return {
        travels: types[id(state[name])] for name, travels in travel_names(state).items() if id(state[name]) in types
    }


class ModuleTypes:
    """Knows the types by the module that it saw last; before that, by the trainer's own model if it is a module."""

    def __init__(self, model: object) -> None:
        self._model = model
        self._types: dict[str, set[str]] | None = None

    def see(self, source: object, split: Iterable[tuple[str, bool]]) -> None:
        """Take the types of a module if the split asks for types; raises UsageError if one of its patterns fits none.

        A state_dict has no types. What was seen before holds for it.
        """
        patterns = [(pattern, glob) for pattern, _ in split if (glob := type_glob(pattern)) is not None]
        if patterns and isinstance(source, torch.nn.Module):
            self._types = types_of(source)
        for pattern, glob in patterns:
            known = set().union(*self._known(pattern).values())
            if not any(fnmatchcase(each, glob) for each in known):
                raise UsageError(
                    f"the pattern {pattern} of the server's rules matches no type of a module with entries; there are "
                    f"{', '.join(sorted(known))}"
                )

    def is_of_type(self, name: str, glob: str) -> bool:
        """Tell whether an entry is in a module of a type that a glob matches; raises UsageError if nobody knows."""
        types = self._known(f"<{glob}>").get(name)
        if types is None:
            raise UsageError(
                f"{name!r} is no parameter or buffer of the model, so <{glob}> of the server's rules cannot say "
                f"whether it stays at home; give it a rule by name before, for example --aggregate '{name}=local'"
            )
        return any(fnmatchcase(each, glob) for each in types)

    def _known(self, pattern: str) -> dict[str, set[str]]:
        if self._types is None and isinstance(self._model, torch.nn.Module):
            self._types = types_of(self._model)
        if self._types is None:
            raise UsageError(
                f"the server's rules choose by the types of modules ({pattern}), which a state_dict does not have; "
                "give the module itself: Trainer(model=module), task.load_into(module) or task.reply(module)"
            )
        return self._types
