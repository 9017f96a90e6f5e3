"""What a call that drafting can't serve is told."""


class Refusal(ValueError):
    """
    Drafting can't serve a call as it is, although the draft fits the target.

    Raised before anything has run, so that a call whose draft was attached goes on without it.
    """

    # Told to whoever passed the draft; a call around that one, which has run so far, has no part in it.
    has_left = False
