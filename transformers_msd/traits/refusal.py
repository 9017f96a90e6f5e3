"""What a call that drafting can't serve is told."""


class Refusal(ValueError):
    """
    Drafting can't serve a call as it is, although the draft fits the target.

    Raised before anything has run, so that a call whose draft was attached goes on without it.
    """
