"""Run sb3-contrib's CrossQ, off-policy reinforcement learning without target networks, on our BatchRenorm1d.

CrossQ stands on Batch Renorm in its critics and its actor. Ours takes the place of sb3-contrib's layer, whose
limits jump from BatchNorm's to the final ones after a warm-up; here they rise as in the paper. The script
lets both balance a pendulum, and prints the mean return of ten episodes: -1,200 is chance, -150 is balanced.

$ pip install 'renormify[rl]'
$ python examples/06_crossq.py --steps 4000
"""

import argparse
from unittest.mock import patch

from renormify import BatchRenorm1d, PaperSchedule, RenormScheduler

try:
    from sb3_contrib import CrossQ
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
except ImportError:
    raise SystemExit("sb3-contrib is needed for its CrossQ: pip install 'renormify[rl]'") from None


class DropIn(BatchRenorm1d):
    """Our layer with the arguments of sb3-contrib's; a schedule moves the limits, not ``warmup_steps``."""

    def __init__(
        self,
        num_features: int,
        eps: float = 0.001,
        momentum: float = 0.01,
        affine: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, r_max=1.0, d_max=0.0)


class Limits(BaseCallback):
    """Moves r_max and d_max with the steps of the environment, as many as those of the optimizer."""

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self.schedule = PaperSchedule.scaled(total_steps)

    def _init_callback(self) -> None:
        self.scheduler = RenormScheduler(self.model.policy, self.schedule)

    def _on_step(self) -> bool:
        self.scheduler.step()
        return True


def crossq(steps: int, seed: int = 0) -> CrossQ:
    """CrossQ on the pendulum, small enough for a CPU."""
    return CrossQ(
        "MlpPolicy",
        "Pendulum-v1",
        seed=seed,
        device="cpu",
        policy_kwargs={
            "net_arch": {"pi": [64, 64], "qf": [256, 256]},
            "renorm_warmup_steps": steps // 26,  # sb3-contrib's layer: the paper's share of a run
        },
    )


def mean_return(agent: CrossQ, episodes: int) -> float:
    """Of episodes of 200 steps each, the same for each agent, in evaluation mode."""
    environment = agent.get_env()
    environment.seed(100)
    return evaluate_policy(agent, environment, n_eval_episodes=episodes)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps, episodes, seed = options.steps, options.episodes, options.seed

    original = crossq(steps, seed)
    print(f"before training: {mean_return(original, episodes):.0f}")
    original.learn(steps)
    print(f"sb3-contrib's layer, after {steps} steps: {mean_return(original, episodes):.0f}", flush=True)

    # The policy finds its layer under this name when it builds, and whenever it switches modes.
    with patch("sb3_contrib.crossq.policies.BatchRenorm1d", DropIn):
        ours = crossq(steps, seed)
        ours.learn(steps, callback=Limits(steps))
        print(f"renormify's layer, after {steps} steps: {mean_return(ours, episodes):.0f}")


if __name__ == "__main__":
    main()
