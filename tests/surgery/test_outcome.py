from batchnorm.surgery import Change, Note, Refusal, SurgeryReport


def test_report_prints_as_aligned_tables():
    report = SurgeryReport(
        (Change("a", "one"), Change("layer.b", "two")),
        (Refusal("", "three"),),
        (Note("c", "four"),),
        1.23456e-7,
    )
    assert str(report).splitlines() == [
        "changed (2)",
        "  a        one",
        "  layer.b  two",
        "left alone (1)",
        "  (model)  three",
        "to know (1)",
        "  c  four",
        "largest output difference, relative: 1.2e-07",
    ]


def test_empty_report_says_so():
    assert str(SurgeryReport()) == "nothing to do"
