"""Distillation as one recipe: where pairs come from x where they are carried x a distance x a target x extra terms.

A consistency-type method says, of every row, two states of one path, ``x`` at time t and ``y`` at a time s nearer to
the data, and that both lead to the same place at ``end``. The student carries x there with a gradient; the target
carries y there without. A method file chooses pieces:

- ``teacher.Before``: the model as it was, which is the teacher when its own network is trained;
- ``pairs``: the teacher's own chains (``Chains``: no data are needed), or data with noise (``Noised``);
- ``losses.consistency``: the distance;
- ``recipe.Distillation``: the method, with its moving target and further terms.
"""

from tropism.distillation.noised import Noised, Pictures, Stepped
from tropism.distillation.pairs import Chains, Pairs, Source
from tropism.distillation.recipe import Distillation, Term, carried
from tropism.distillation.teacher import Before

__all__ = ["Before", "Chains", "Distillation", "Noised", "Pairs", "Pictures", "Source", "Stepped", "Term", "carried"]
