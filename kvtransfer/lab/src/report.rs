//! What the run gathers from the guest, and the table at its end.

use std::{
    fs::{self, File},
    io::Write as _,
    path::PathBuf,
};

use anyhow::{Context as _, Result};

use crate::{
    jobs::SELF_TEST,
    protocol::{Ended, Report},
};

/// How a job came out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// It ran, and ended so after that many seconds.
    Ran(Ended, f64),
    /// It was not run, and why.
    Skipped(String),
    /// It was ordered and did not start.
    Lost,
    /// It was started and did not end: the last that it printed, and whether that was the beginning of a line.
    Cut { last: String, is_part: bool },
}

/// The jobs of a run and their outcomes.
#[derive(Debug)]
pub(crate) struct Results {
    jobs: Vec<(String, Outcome)>,
    /// Where files of jobs go.
    outputs: PathBuf,
    has_files: bool,
}

impl Results {
    /// Of a run that begins; `jobs` in the order of the table, with what is known beforehand.
    pub(crate) fn new(jobs: Vec<(String, Outcome)>, outputs: PathBuf) -> Self {
        Self {
            jobs,
            outputs,
            has_files: false,
        }
    }

    /// Takes a report; the lines to show for it.
    pub(crate) fn take(&mut self, report: Report) -> Result<Option<String>> {
        match report {
            Report::Stage { name, seconds } => {
                return Ok(Some(format!("lab: {seconds:5.1} s  guest: {name}")));
            }
            Report::Started { job } => {
                self.note(&job, "", false);
                return Ok(Some(format!("lab: start {job}")));
            }
            Report::Output { job, text } => {
                // What a test leaves empty between its lines says nothing.
                if !text.trim().is_empty() {
                    self.note(&job, &text, false);
                }
                return Ok(Some(format!("{job} | {text}")));
            }
            Report::Part { job, text } => self.note(&job, &text, true),
            Report::Job {
                job,
                ended,
                seconds,
            } => {
                let outcome = Outcome::Ran(ended, seconds);
                let line = format!("lab: {job}: {}", outcome.words());
                self.set(&job, outcome);
                return Ok(Some(line));
            }
            Report::File { job, name, bytes } => self.keep(&job, &name, &bytes)?,
            Report::Broken { .. } | Report::Done => {}
        }
        Ok(None)
    }

    fn set(&mut self, job: &str, outcome: Outcome) {
        if let Some((_, known)) = self.jobs.iter_mut().find(|(name, _)| name == job) {
            *known = outcome;
        }
    }

    /// Remembers the last that a job printed, for the case that nothing comes after it.
    fn note(&mut self, job: &str, text: &str, is_part: bool) {
        let last = text.trim_end().to_owned();
        self.set(job, Outcome::Cut { last, is_part });
    }

    /// What was running when the machine ended, if anything was.
    pub(crate) fn cut_short(&self) -> Option<String> {
        let cut = |outcome: &Outcome| matches!(outcome, Outcome::Cut { .. });
        let (name, outcome) = self.jobs.iter().find(|(_, outcome)| cut(outcome))?;
        let Outcome::Cut { last, is_part } = outcome else {
            return None;
        };
        Some(match (is_part, last.as_str()) {
            (_, "") => format!("{name} was running, and had printed nothing"),
            (true, last) => format!("{name} was running: {last}"),
            (false, last) => format!("{name} was running, and had printed last: {last}"),
        })
    }

    /// Appends a piece of a job's file.
    fn keep(&mut self, job: &str, name: &str, bytes: &[u8]) -> Result<()> {
        // Only names of our own jobs become folders.
        if !self.jobs.iter().any(|(known, _)| known == job) {
            return Ok(());
        }
        let folder = self.outputs.join(job);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join(name);
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        file.write_all(bytes)
            .with_context(|| format!("writing {}", path.display()))?;
        self.has_files = true;
        Ok(())
    }

    /// The table, and whether the run passed: something ran, all that ran passed, and nothing that was asked for by
    /// name is missing.
    pub(crate) fn table(&self, asked: &[String]) -> (String, bool) {
        let width = self
            .jobs
            .iter()
            .map(|(name, _)| name.len())
            .max()
            .unwrap_or(0);
        let mut table = String::new();
        let mut counts = [0_usize; 3];
        let mut is_missing = false;
        for (name, outcome) in &self.jobs {
            let which = match outcome {
                Outcome::Ran(Ended::Exited(0), _) => 0,
                Outcome::Ran(..) | Outcome::Lost | Outcome::Cut { .. } => 1,
                Outcome::Skipped(_) => 2,
            };
            counts[which] += 1;
            is_missing |= which == 2 && asked.contains(name);
            table.push_str(&format!("  {name:width$}  {}\n", outcome.words()));
        }
        if self.has_files {
            table.push_str(&format!("files of jobs: {}\n", self.outputs.display()));
        }
        let words = self.kinds().into_iter().map(|(kind, is_ok)| {
            let word = if is_ok { "ok" } else { "BROKEN" };
            format!("{kind} {word}")
        });
        let words: Vec<String> = words.collect();
        if !words.is_empty() {
            table.push_str(&format!("lab: {}\n", words.join(", ")));
        }
        let [passed, failed, skipped] = counts;
        if is_missing {
            table.push_str("failed: a job that was asked for did not run\n");
        }
        if passed + failed == 0 {
            table.push_str("failed: nothing ran\n");
        }
        table.push_str(&format!(
            "{passed} passed, {failed} failed, {skipped} skipped"
        ));
        (table, passed > 0 && failed == 0 && !is_missing)
    }

    /// Whether the self-test of each kind of device passed, of the kinds whose self-test was run as a whole.
    fn kinds(&self) -> Vec<(&'static str, bool)> {
        let mut kinds = Vec::new();
        for kind in ["siw", "rxe"] {
            let tests: Vec<_> = SELF_TEST
                .iter()
                .filter(|name| name.ends_with(kind))
                .collect();
            let of_kind = |(name, _): &&(String, Outcome)| tests.iter().any(|test| *test == name);
            let ran: Vec<_> = self.jobs.iter().filter(of_kind).collect();
            if ran.len() == tests.len() {
                let is_ok =
                    |outcome: &Outcome| matches!(outcome, Outcome::Ran(Ended::Exited(0), _));
                kinds.push((kind, ran.iter().all(|(_, outcome)| is_ok(outcome))));
            }
        }
        kinds
    }
}

impl Outcome {
    fn words(&self) -> String {
        match self {
            Self::Ran(Ended::Exited(0), seconds) => format!("ok       {seconds:6.1} s"),
            Self::Ran(Ended::Exited(code), seconds) => {
                format!("FAILED   {seconds:6.1} s  exit code {code}")
            }
            Self::Ran(Ended::Killed(signal), seconds) => {
                format!("FAILED   {seconds:6.1} s  signal {signal}")
            }
            Self::Ran(Ended::TimedOut, seconds) => {
                format!("FAILED   {seconds:6.1} s  over its limit, killed")
            }
            Self::Skipped(why) => format!("skipped            {why}"),
            Self::Lost => "FAILED             the machine ended before it".to_owned(),
            Self::Cut { last, .. } if last.is_empty() => {
                "FAILED             the machine ended during it".to_owned()
            }
            Self::Cut { last, .. } => {
                format!("FAILED             the machine ended during it: {last}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(jobs: &[(&str, Outcome)]) -> Results {
        let jobs = jobs
            .iter()
            .map(|(name, outcome)| ((*name).to_owned(), outcome.clone()));
        Results::new(jobs.collect(), PathBuf::from("/nowhere"))
    }

    fn passed(code: i32) -> Outcome {
        Outcome::Ran(Ended::Exited(code), 1.0)
    }

    #[test]
    fn a_run_passes_only_if_something_ran_and_all_passed() {
        let why = || Outcome::Skipped("no test".to_owned());
        let cases: [(&[(&str, Outcome)], bool); 6] = [
            (&[], false),
            (&[("a", why())], false),
            (&[("a", passed(0)), ("b", why())], true),
            (&[("a", passed(0)), ("b", passed(1))], false),
            (&[("a", passed(0)), ("b", Outcome::Lost)], false),
            (
                &[("a", passed(0)), ("b", Outcome::Ran(Ended::TimedOut, 9.0))],
                false,
            ),
        ];
        for (jobs, expected) in cases {
            let (table, is_passed) = results(jobs).table(&[]);
            assert_eq!(is_passed, expected, "{table}");
        }
        let skipped = results(&[("a", passed(0)), ("b", why())]);
        let (table, is_passed) = skipped.table(&["b".to_owned()]);
        assert!(!is_passed, "a job asked for by name did not run: {table}");
        assert!(table.ends_with("1 passed, 0 failed, 1 skipped"), "{table}");
    }

    #[test]
    fn the_self_test_says_which_kind_of_device_works() {
        let with = |name: &str| {
            let code = i32::from(name == "perftest-rxe");
            (name.to_owned(), passed(code))
        };
        let mut results = Results::new(SELF_TEST.map(with).to_vec(), PathBuf::from("/nowhere"));
        assert_eq!(results.kinds(), [("siw", true), ("rxe", false)]);
        results.jobs.remove(0);
        assert_eq!(
            results.kinds(),
            [("rxe", false)],
            "half a self-test says nothing"
        );
    }

    #[test]
    fn a_job_is_lost_until_it_reports_its_end() {
        let mut results = results(&[("a", Outcome::Lost)]);
        assert!(!results.table(&[]).1);
        let report = Report::Job {
            job: "a".to_owned(),
            ended: Ended::Exited(0),
            seconds: 1.0,
        };
        results.take(report).expect("nothing to write");
        assert!(results.table(&[]).1);
    }

    #[test]
    fn the_test_during_which_the_machine_ended_is_named() {
        let mut results = results(&[("a", Outcome::Lost), ("b", Outcome::Lost)]);
        assert_eq!(results.cut_short(), None);
        let job = || "a".to_owned();
        let output = |text: &str| Report::Output {
            job: job(),
            text: text.to_owned(),
        };
        let reports = [
            (Report::Started { job: job() }, "and had printed nothing"),
            (output("test one ... ok"), "last: test one ... ok"),
            (output(""), "last: test one ... ok"),
            (
                Report::Part {
                    job: job(),
                    text: "test rails::two ... ".to_owned(),
                },
                "a was running: test rails::two ...",
            ),
        ];
        for (report, expected) in reports {
            results.take(report).expect("nothing to write");
            let said = results.cut_short().expect("it runs");
            assert!(said.ends_with(expected), "{said}");
        }
        let (table, is_passed) = results.table(&[]);
        assert!(!is_passed);
        assert!(
            table.contains("ended during it: test rails::two ..."),
            "{table}"
        );
        assert!(
            table.contains("ended before it"),
            "b never started: {table}"
        );
    }
}
