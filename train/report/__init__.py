"""The report of a run: pictures in RUN/report/ and one page, RUN/report.html. `python -m train.report RUN` makes it again."""
