"""For main jobs and validations of which no test looks at latencies: measuring them is most of their time."""

SECONDS = 0.5
HURRY = ("--seconds", str(SECONDS))
