"""Lottery tickets: the search in rounds, the ticket and its file, and the participant that goes back in a training."""

from fasterai.sparse.tickets.lottery import LotteryTicket

__all__ = ["LotteryTicket"]
