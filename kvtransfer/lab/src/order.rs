//! What the guest shall run, as a text file in its image.

use anyhow::{Context as _, Result, bail, ensure};

use crate::protocol::is_word;

/// One job, ready to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    /// Its name, one word.
    pub(crate) name: String,
    /// Its limit in seconds of the guest's clock.
    pub(crate) limit_s: u64,
    /// Variables of its environment.
    pub(crate) env: Vec<(String, String)>,
    /// The program and its arguments.
    pub(crate) arguments: Vec<String>,
}

impl Order {
    /// The text that [`Self::parse_all`] reads.
    pub(crate) fn text(&self) -> Result<String> {
        ensure!(is_word(&self.name), "{:?} cannot name a job", self.name);
        ensure!(
            !self.arguments.is_empty(),
            "job {} has no program",
            self.name
        );
        let mut text = format!("job {} {}\n", self.limit_s, self.name);
        for (key, value) in &self.env {
            text.push_str(&format!("env {key}={value}\n"));
        }
        for argument in &self.arguments {
            text.push_str(&format!("arg {argument}\n"));
        }
        let lines = 1 + self.env.len() + self.arguments.len();
        ensure!(
            text.lines().count() == lines,
            "job {}: no argument or variable can have a line break",
            self.name
        );
        Ok(text)
    }

    /// Reads the orders of a file.
    pub(crate) fn parse_all(text: &str) -> Result<Vec<Self>> {
        let mut orders: Vec<Self> = Vec::new();
        for line in text.lines() {
            let (kind, rest) = line.split_once(' ').context("a line of the orders")?;
            if kind == "job" {
                let (limit, name) = rest.split_once(' ').context("a job's line")?;
                orders.push(Self {
                    name: name.to_owned(),
                    limit_s: limit.parse().context("a job's limit")?,
                    env: Vec::new(),
                    arguments: Vec::new(),
                });
                continue;
            }
            let order = orders.last_mut().context("a line before the first job")?;
            match kind {
                "env" => {
                    let (key, value) = rest.split_once('=').context("a job's variable")?;
                    order.env.push((key.to_owned(), value.to_owned()));
                }
                "arg" => order.arguments.push(rest.to_owned()),
                _ => bail!("{kind:?} in the orders"),
            }
        }
        Ok(orders)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        Order {
            name: "one-job".to_owned(),
            limit_s: 60,
            env: vec![("A".to_owned(), "x=y z".to_owned())],
            arguments: vec![
                "/bin/sh".to_owned(),
                "-c".to_owned(),
                "a  'b' $c".to_owned(),
            ],
        }
    }

    #[test]
    fn orders_survive_their_text() {
        let second = Order {
            name: "two".to_owned(),
            env: Vec::new(),
            ..order()
        };
        let text = order().text().expect("valid") + &second.text().expect("valid");
        assert_eq!(Order::parse_all(&text).expect("valid"), [order(), second]);
    }

    #[test]
    fn what_would_not_survive_is_refused() {
        let mut broken = order();
        broken.arguments.push("two\nlines".to_owned());
        assert!(broken.text().is_err());
        let mut broken = order();
        broken.name = "two words".to_owned();
        assert!(broken.text().is_err());
        let mut broken = order();
        broken.arguments.clear();
        assert!(broken.text().is_err());
    }
}
