"""How good pictures are: scorers, the best of several, the distance between two folders, and sana-nano's own judge."""

from .distance import frechet_distance
from .scorers import Scorer, load_scorer, score_pictures
from .selection import Selection, best_of, ranking

__all__ = ["Scorer", "Selection", "best_of", "frechet_distance", "load_scorer", "ranking", "score_pictures"]
