//! From the table of jobs to what is built and what the guest is ordered to run.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    Arguments,
    build::{self, Built, Wanted},
    jobs::{JOBS, Job, LAB_VARIABLE, SELF_TEST, Source, threads_of},
    order::Order,
    report::Outcome,
};

/// Where the guest finds programs of the workspace.
const PROGRAMS: &str = "/usr/bin";
/// The guest's name for the unit tests of kvtransfer's library.
const UNIT_TESTS: &str = "kvtransfer-lib";

/// What is ready to be put into the image.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// What the guest runs, in order.
    pub(crate) orders: Vec<Order>,
    /// All jobs of the table at the end, with those that are not run.
    pub(crate) outcomes: Vec<(String, Outcome)>,
    /// Programs of the workspace: where they are, and their name in the guest.
    pub(crate) programs: Vec<(PathBuf, String)>,
}

/// The text of `--list`.
pub(crate) fn listing() -> Result<String> {
    let mut text = String::new();
    for job in &JOBS {
        writeln!(text, "{:16} {}", job.name, job.about)?;
        if let Source::TestTargets(prefix) = job.source {
            let targets = build::test_targets(prefix)?;
            for target in &targets {
                writeln!(text, "  {target}")?;
            }
            if targets.is_empty() {
                writeln!(text, "  (no test target is named {prefix}* yet)")?;
            }
        }
    }
    text.truncate(text.trim_end().len());
    Ok(text)
}

/// Chooses, builds, and writes the orders.
pub(crate) fn make(arguments: &Arguments) -> Result<Plan> {
    let chosen = choose(arguments)?;
    let mut wanted = Wanted {
        as_tested: arguments.as_tested,
        ..Wanted::default()
    };
    for name in &arguments.build {
        let (package, binary) = name.split_once(':').context("--build is PACKAGE:BINARY")?;
        wanted
            .binaries
            .insert((package.to_owned(), binary.to_owned()));
    }
    for name in &arguments.build_test {
        match name.as_str() {
            "lib" => wanted.unit_tests = true,
            name => drop(wanted.test_targets.insert(name.to_owned())),
        }
    }
    for step in &chosen {
        match step {
            Step::Target { name, .. } => drop(wanted.test_targets.insert(name.clone())),
            Step::Job(job) => {
                wanted.unit_tests |= matches!(job.source, Source::UnitTests(_));
                let owned =
                    |(package, binary): &(&str, &str)| ((*package).into(), (*binary).into());
                wanted.binaries.extend(job.binaries.iter().map(owned));
                wanted.released.extend(job.released.iter().map(owned));
            }
            Step::Missing { .. } => {}
        }
    }
    let built = build::build(&wanted)?;
    let mut plan = Plan::default();
    for program in &built {
        plan.programs
            .push((program.path.clone(), guest_name(program)));
    }
    for step in &chosen {
        plan.add(step, &built)?;
    }
    for (index, line) in arguments.run.iter().enumerate() {
        let name = if index == 0 {
            "run".to_owned()
        } else {
            format!("run-{}", index + 1)
        };
        plan.order(&name, arguments.run_limit, shell(line));
    }
    Ok(plan)
}

fn guest_name(program: &Built) -> String {
    if program.kind == "lib" {
        return UNIT_TESTS.to_owned();
    }
    program.name.clone()
}

/// A job that was chosen.
#[derive(Debug, PartialEq)]
enum Step {
    Job(&'static Job),
    Target { name: String, limit_s: u64 },
    Missing { name: String, why: String },
}

impl PartialEq for Job {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

fn choose(arguments: &Arguments) -> Result<Vec<Step>> {
    if !arguments.run.is_empty() {
        return Ok(Vec::new());
    }
    let mut steps = Vec::new();
    let is_named = |name: &str| arguments.only.iter().any(|only| only == name);
    for job in &JOBS {
        let is_chosen = match (arguments.self_test, arguments.only.is_empty()) {
            (true, _) => SELF_TEST.contains(&job.name),
            (false, true) => true,
            (false, false) => is_named(job.name),
        };
        if let Some(why) = job.on_request
            && is_chosen
            && !is_named(job.name)
        {
            let (name, why) = (job.name.to_owned(), why.to_owned());
            steps.push(Step::Missing { name, why });
            continue;
        }
        let Source::TestTargets(prefix) = job.source else {
            steps.extend(is_chosen.then_some(Step::Job(job)));
            continue;
        };
        let is_of_family = |only: &String| only.starts_with(prefix);
        if !is_chosen && !arguments.only.iter().any(is_of_family) {
            continue;
        }
        let targets = build::test_targets(prefix)?;
        if targets.is_empty() && is_chosen {
            let why = format!("kvtransfer has no test target named {prefix}*");
            let name = job.name.to_owned();
            steps.push(Step::Missing { name, why });
        }
        let limit_s = job.limit_s;
        let chosen = targets
            .into_iter()
            .filter(|name| is_chosen || is_named(name));
        steps.extend(chosen.map(|name| Step::Target { name, limit_s }));
    }
    for only in &arguments.only {
        let is_known = JOBS.iter().any(|job| job.name == only)
            || steps
                .iter()
                .any(|step| matches!(step, Step::Target { name, .. } if name == only));
        if !is_known {
            bail!("no job is named {only}; `cargo rdma-test --list` shows them");
        }
    }
    Ok(steps)
}

impl Plan {
    fn add(&mut self, step: &Step, built: &[Built]) -> Result<()> {
        match step {
            Step::Missing { name, why } => self.skip(name, why),
            Step::Target { name, limit_s } => {
                let program = find(built, name, "test")?;
                if build::tests_in(program, None, false)? == 0 {
                    self.skip(name, "it has no tests");
                    return Ok(());
                }
                let threads = threads_of(name);
                let words = [name.as_str(), "--include-ignored", threads];
                self.order(name, *limit_s, program_line(&words));
            }
            Step::Job(job) => match job.source {
                Source::Line(line) => self.order(job.name, job.limit_s, shell(line)),
                Source::UnitTests(filter) => {
                    let program = find(built, "kvtransfer", "lib")?;
                    if build::tests_in(program, Some(filter), true)? == 0 {
                        self.skip(job.name, &format!("no ignored unit test below {filter}"));
                        return Ok(());
                    }
                    let words = [UNIT_TESTS, filter, "--ignored", "--test-threads=1"];
                    self.order(job.name, job.limit_s, program_line(&words));
                }
                Source::TestTargets(_) => bail!("invariant: a family was chosen as one job"),
            },
        }
        Ok(())
    }

    fn skip(&mut self, name: &str, why: &str) {
        self.outcomes
            .push((name.to_owned(), Outcome::Skipped(why.to_owned())));
    }

    fn order(&mut self, name: &str, limit_s: u64, arguments: Vec<String>) {
        let env = [
            (LAB_VARIABLE, "1"),
            ("RUST_BACKTRACE", "1"),
            ("HOME", "/root"),
        ];
        self.orders.push(Order {
            name: name.to_owned(),
            limit_s,
            env: env
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .to_vec(),
            arguments,
        });
        self.outcomes.push((name.to_owned(), Outcome::Lost));
    }
}

fn find<'a>(built: &'a [Built], name: &str, kind: &str) -> Result<&'a Path> {
    let found = built
        .iter()
        .find(|built| built.name == name && built.kind == kind);
    let found = found.with_context(|| format!("cargo built no {kind} named {name}"))?;
    Ok(&found.path)
}

fn shell(line: &str) -> Vec<String> {
    ["/bin/sh", "-c", line].map(str::to_owned).to_vec()
}

fn program_line(words: &[&str]) -> Vec<String> {
    let mut line: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    line[0] = format!("{PROGRAMS}/{}", line[0]);
    line
}
