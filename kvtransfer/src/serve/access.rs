//! Who may ask: an optional bearer token, compared in constant time.

use crate::token::{BearerToken, InvalidToken};

/// Which requests need the token. `GET /health` never does: probes of orchestrators carry none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// `PUT` and `POST`. Stock decode ranks, which send no token, can still read.
    #[default]
    Writes,
    /// Every request.
    All,
}

/// The rule of one listener.
#[derive(Clone, Default)]
pub struct Access {
    token: Option<BearerToken>,
    scope: Scope,
}

// The token must not reach a log.
impl std::fmt::Debug for Access {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Access")
            .field("token", &self.token.as_ref().map(|_| "set"))
            .field("scope", &self.scope)
            .finish()
    }
}

impl Access {
    /// Everybody may ask everything.
    #[must_use]
    pub fn open() -> Self {
        Self::default()
    }

    /// Requests in `scope` must carry `Authorization: Bearer <token>`. White space around the token (a file's last
    /// newline) is dropped.
    ///
    /// # Errors
    /// [`InvalidToken`] if no header could carry it.
    pub fn bearer(token: &str, scope: Scope) -> Result<Self, InvalidToken> {
        let token = Some(BearerToken::new(token.trim())?);
        Ok(Self { token, scope })
    }

    /// Whether a token is asked for at all.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.token.is_none()
    }

    /// Whether the request may proceed. The time taken tells nothing of the token but its length.
    #[must_use]
    pub fn permits(&self, is_write: bool, authorization: Option<&[u8]>) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        if self.scope == Scope::Writes && !is_write {
            return true;
        }
        authorization.is_some_and(|offered| token.accepts(offered))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_scope_guards_writes_only() {
        let access = Access::bearer("s3cret\n", Scope::Writes).unwrap();
        assert!(access.permits(false, None));
        assert!(!access.permits(true, None));
        for (value, expected) in [
            ("Bearer s3cret", true),
            ("bearer  s3cret ", true),
            ("Bearer s3cre", false),
            ("Bearer s3cretX", false),
            ("Basic s3cret", false),
            ("Bearer", false),
            ("", false),
        ] {
            assert_eq!(
                access.permits(true, Some(value.as_bytes())),
                expected,
                "{value:?}"
            );
        }
        assert!(
            !Access::bearer("x", Scope::All)
                .unwrap()
                .permits(false, None)
        );
        assert!(Access::open().permits(true, None));
    }

    #[test]
    fn unusable_tokens_are_refused_and_none_is_printed() {
        for token in [
            "",
            " \n",
            "a b",
            "é",
            &"x".repeat(crate::token::TOKEN_BYTES_MAX + 1),
        ] {
            assert!(Access::bearer(token, Scope::All).is_err());
        }
        let access = Access::bearer("s3cret", Scope::All).unwrap();
        assert!(!format!("{access:?}").contains("s3cret"));
    }
}
