"""The models that are served, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from semid_server.errors import FingerprintMismatchError, ModelNotFoundError, NotServingError

if TYPE_CHECKING:
    from semid_server.serving.types import ServedModel


class Catalogue:
    """Models by name, each in the version that is served now; the first is the default.

    What was looked up stays whole when a newer version takes its place: requests that were
    admitted for a version are answered by it.
    """

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}

    def put(self, model: ServedModel) -> None:
        """Serve ``model`` from now on, in place of the version of its name, if there is one."""
        self._models[model.name] = model

    def find(self, name: str) -> ServedModel:
        """Return the model called ``name``, or the default for an empty name.

        Raises
        ------
        NotServingError
            No model is loaded yet.
        ModelNotFoundError
            None is called so.
        """
        if not self._models:
            raise NotServingError("the model is being loaded; try again soon")
        if not name:
            return next(iter(self._models.values()))
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(name=name, available=sorted(self._models))
        return model

    def expect(self, name: str, fingerprint: str) -> ServedModel:
        """Return the model called ``name`` if its fingerprint is the one expected, if any is.

        Raises
        ------
        FingerprintMismatchError
            It is another.
        """
        model = self.find(name)
        if fingerprint and fingerprint != model.fingerprint:
            raise FingerprintMismatchError(
                model=model.name, expected=fingerprint, actual=model.fingerprint
            )
        return model

    @property
    def names(self) -> list[str]:
        """Names of all models, in the order in which they came."""
        return list(self._models)

    @property
    def models(self) -> list[ServedModel]:
        """All models, by name."""
        return [self._models[name] for name in sorted(self._models)]


class PinnedCatalogue(Catalogue):
    """A view for one stream: a model that it has found stays in that version to its end."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        self._catalogue = catalogue
        self._found: dict[str, ServedModel] = {}

    def find(self, name: str) -> ServedModel:
        """Return the version that this view has found before, by whichever name, or the present."""
        model = self._found.get(name)
        if model is None:
            model = self._catalogue.find(name)
            # The default model has two names: its own, and the empty one.
            model = self._found[name] = self._found.setdefault(model.name, model)
        return model
