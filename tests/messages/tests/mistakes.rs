//! What the compiler says of likely mistakes has a reason in it, and a way out.

#[test]
fn each_likely_mistake_is_explained() {
    trybuild::TestCases::new().compile_fail("tests/mistakes/*.rs");
}
