"""Multinomial logistic regression, many small problems of it, to scikit-learn's optimum in a fraction of its time.

The features of neighbouring spots are nearly collinear, so that plain L-BFGS needs hundreds of steps. With the
variables V = L^T W, where L L^T = c X^T X + λ I, the Hessian is near the identity and a few dozen do. The penalty
then needs no matrix product of its own: λ |W|^2 = |V|^2 - c |Z V|^2 with Z = X L^-T, because c Z^T Z + λ L^-1 L^-T = I.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import cholesky, eigh, solve_triangular
from scipy.optimize import minimize

CURVATURE = 0.003  # c: about the mean of p (1 - p) at the optimum; it decides how fast, not where
GRADIENT_TOLERANCE = 3e-3  # largest entry, of the loss summed over spots; scikit-learn stops at 1e-4 a spot


def logistic_regression(
    inputs: np.ndarray, targets: np.ndarray, tolerance: float = GRADIENT_TOLERANCE
) -> tuple[np.ndarray, np.ndarray]:
    """Weights that minimise the summed cross-entropy plus |W|^2 / 2, scikit-learn's `LogisticRegression(C=1)`.

    With two classes its penalty is that of the difference of the two classes' weights, and so is this one.

    Parameters
    ----------
    inputs
        float64 (n, d), standardised. They need not be of full rank.
    targets
        int64 (n,), class numbers from 0, each of them met, at least two.
    tolerance
        Largest entry of the gradient, of the loss summed over spots, at which to stop.

    Returns
    -------
    float64 (d, classes) and (classes,): weights and intercepts.
    """
    num_classes = int(targets.max()) + 1
    penalty = 2.0 if num_classes == 2 else 1.0
    conditioned, restore = _conditioned(inputs, penalty)  # (n, r)
    rank = conditioned.shape[1]
    onehot, spots = np.eye(num_classes)[targets], np.arange(len(targets))

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = flat.reshape(rank + 1, num_classes)
        weights = parameters[:-1]
        scores = (conditioned @ weights.astype(np.float32)).astype(np.float64)
        shifted = scores + parameters[-1]
        shifted -= shifted.max(1, keepdims=True)
        exponentials = np.exp(shifted)
        totals = exponentials.sum(1, keepdims=True)
        cross_entropy = np.log(totals).sum() - shifted[spots, targets].sum()
        residual = exponentials / totals - onehot
        gradient = np.empty_like(parameters)
        gradient[:-1] = conditioned.T @ (residual - CURVATURE * scores).astype(np.float32) + weights
        gradient[-1] = residual.sum(0)
        return cross_entropy + 0.5 * ((weights**2).sum() - CURVATURE * (scores**2).sum()), gradient.ravel()

    options = {"maxiter": 2000, "gtol": tolerance, "ftol": 0.0}
    found = minimize(
        loss_and_gradient, np.zeros((rank + 1) * num_classes), jac=True, method="L-BFGS-B", options=options
    )
    parameters = found.x.reshape(rank + 1, num_classes)
    return restore(parameters[:-1]), parameters[-1]


def _conditioned(inputs: np.ndarray, penalty: float) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Z float32 (n, r), and what turns its weights V (r, classes) into those of the inputs (d, classes)."""
    num_spots, width = inputs.shape
    if num_spots >= width:
        gram = CURVATURE * (inputs.T @ inputs)
        gram[np.diag_indices(width)] += penalty
        factor = cholesky(gram, lower=True)
        conditioned = solve_triangular(factor, inputs.T, lower=True).T
        return np.ascontiguousarray(conditioned, dtype=np.float32), lambda weights: solve_triangular(
            factor, weights, lower=True, trans="T"
        )
    # Fewer spots than features: the weights lie in the span of the spots.
    values, vectors = eigh(inputs @ inputs.T)
    kept = values > values[-1] * 1e-12
    values, vectors = values[kept], vectors[:, kept]
    scale = 1 / np.sqrt(CURVATURE * values + penalty)
    directions = inputs.T @ (vectors / np.sqrt(values))  # (d, r), orthonormal
    return (vectors * (np.sqrt(values) * scale)).astype(
        np.float32
    ), lambda weights: directions @ (scale[:, None] * weights)
