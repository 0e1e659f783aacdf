"""What an answer is worth, checked by a program: the rewards of `tune.grpo`, one file a kind."""

from anychip.tune.rewards.reward import Answered, Reward, Score, make_reward

__all__ = ["Answered", "Reward", "Score", "make_reward"]
