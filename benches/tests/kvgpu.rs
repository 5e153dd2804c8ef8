//! What of `kvgpu` needs no GPU.

use std::process::Command;

#[test]
fn heads_arrive_at_other_numbers_of_ranks_in_few_operations() {
    let output = Command::new(env!("CARGO_BIN_EXE_kvgpu"))
        .args(["--json", "heads", "--host", "--pages", "8", "--rounds", "1"])
        .output()
        .expect("kvgpu starts");
    let (said, rows) = (
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout),
    );
    assert!(output.status.success(), "{said} {rows}");
    let rows: Vec<serde_json::Value> = rows
        .lines()
        .map(|line| serde_json::from_str(line).expect("every line is JSON"))
        .collect();
    assert_eq!(rows.len(), 6, "three paths, two ways: {rows:?}");
    for row in &rows {
        assert_eq!(row["verified"], true, "{row}");
        let note = row["note"].as_str().expect("in words");
        let words: Vec<&str> = note.split(' ').collect();
        let number = |place: usize| words[place].parse::<u64>().expect(note);
        // 8 pages of 16 tokens, K and V of 32 layers, in halves of all heads.
        assert_eq!(number(4), 8 * 16 * 64 * 2, "{note}");
        assert!(number(0) * 100 <= number(4), "{note}");
    }
}

#[test]
fn engines_of_one_process_move_the_right_bytes() {
    let run = |mib: &str| {
        Command::new(env!("CARGO_BIN_EXE_kvgpu"))
            .args(["--json", "staging", "--host", "--rounds", "1", "--mib", mib])
            .output()
            .expect("kvgpu starts")
    };
    let output = run("16");
    let (said, rows) = (
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout),
    );
    assert!(output.status.success(), "{said} {rows}");
    assert_eq!(rows.matches("\"verified\":true").count(), 2, "{rows}");
    let refused = run("15");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("multiple of 16"),
        "{said}"
    );
}
